"""`firstlight methods`: what can be switched on with `--method` and `--schedule`, and what each does to an answer."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import re
import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.options import complete_with
from firstlight.core import calibration, registry
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability

app = typer.Typer(help="List and describe methods and schedules.", no_args_is_help=True)
_WIDE = 160
"""Columns of the list where it goes to a file or a pipe."""
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@app.command("list")
def list_methods(as_json: _Json = False) -> None:
    """All methods and schedules, also those of other packages.

    firstlight methods list
    """
    found = everything()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("switch on with", "exact", "needs", "what it does", box=None)
    table.columns[0].no_wrap = True
    for method in found:
        table.add_row(method["flag"], shown(method["exact"]), "; ".join(method["needs"]), _said(method))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(help="A name of `firstlight methods list`.", autocompletion=complete_with(lambda: _names())),
    ],
    as_json: _Json = False,
) -> None:
    """Settings, defaults and capabilities of one method.

    firstlight methods show band
    """
    if name not in _names():
        raise UserError(f"no method or schedule is called {name!r}; choose one of: {', '.join(_names())}")
    method = describe(name)
    if as_json:
        typer.echo(json.dumps(method, indent=2))
        return
    typer.echo(f"{method['flag']}: {_said(method)}")
    for part in method["parts"]:
        _print_part(part)


@app.command()
def check(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="A method, or several that work together; or a schedule. Settings as in `--method`.",
            autocompletion=complete_with(lambda: _names()),
        ),
    ],
    as_json: _Json = False,
) -> None:
    """Run what every method owes the engine on a small model with random weights: for methods of other packages too.

    firstlight methods check band
    """
    from firstlight.evaluate.contract import checks, run, schedule_checks
    from firstlight.evaluate.trial import Broken, Subject

    given = [registry.Method.parse(name) for name in names]
    schedules = [method for method in given if method.name in registry.names(schedules=True)]
    methods = tuple(method for method in given if method not in schedules)
    registry.make_parts(methods)
    subject = Subject(methods, *schedules[:1])
    found: list[dict[str, Any]] = []
    with _quiet("firstlight.engine"):  # what the checks break on purpose is no news
        for name, one in (schedule_checks() if schedules else checks()).items():
            try:
                why = run(one, subject)
                found.append({"check": name, "holds": None if why else True, "why": why or ""})
            except Broken as broken:
                found.append({"check": name, "holds": False, "why": str(broken)})
            if not as_json:
                typer.echo(_told(found[-1]))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    if any(one["holds"] is False for one in found):
        raise typer.Exit(1)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of this logger meanwhile."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _said(method: dict[str, Any]) -> str:
    """What a method does, without its name in front, and with its paper."""
    text = method["about"].removeprefix(f"`{method['name']}`: ")
    return text if not method["paper"] or method["paper"] in text else f"{text} ({method['paper']})"


def _told(found: dict[str, Any]) -> str:
    mark = {True: "holds", None: "  -  ", False: "FAILS"}[found["holds"]]
    return f"{mark}  {found['check']}{': ' * bool(found['why'])}{found['why']}"


def everything() -> list[dict[str, Any]]:
    """Methods, then schedules, described."""
    return [describe(name) for name in _names()]


def _names() -> list[str]:
    return [*registry.names(), *registry.names(schedules=True)]


def describe(name: str) -> dict[str, Any]:
    """One method or schedule as plain data: flag, text, parts, their settings and capabilities."""
    schedules = name in registry.names(schedules=True)
    parts = [_part(seam, cls) for seam, cls in registry.classes(name, schedules=schedules).items()]
    flag = "--schedule" if schedules else "--method"
    about = next((part["about"] for part in parts if part["about"]), "")
    exact = schedules or all(part["capability"]["exact"] for part in parts)
    paper = next((part["paper"] for part in parts if part["paper"]), None)
    needs = list(dict.fromkeys(need for part in parts for need in _needs(part["capability"])))
    return {
        "name": name,
        "flag": f"{flag} {name}",
        "exact": exact,
        "paper": paper,
        "needs": needs,
        "about": about,
        "parts": parts,
    }


def _needs(capability: dict[str, Any]) -> Iterator[str]:
    """What a part asks for, as its capability record says."""
    if capability["calibration"]:
        yield "calibration"
    if capability["whole_prompt"]:
        yield "whole prompt at once"
    if capability["last_rows"]:
        yield f"last {capability['last_rows']} rows"
    if capability["chunk"]:
        yield f"chunks of {capability['chunk']}"
    if capability["looks"]:
        yield "keys"
    yield from capability["digests"]


def _part(seam: str, cls: Any) -> dict[str, Any]:
    text = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    capability = getattr(cls, "capability", Capability(exact=True, alters_cells=False))
    settings = [_setting(field, cls) for field in dataclasses.fields(cls.Config)]
    if capability.calibration:
        settings.append({"name": calibration.KEY, "type": "FILE", "default": None, "doc": calibration.KEY_DOC})
    return {
        "seam": seam,
        "home": f"{cls.__module__}:{cls.__qualname__}",
        "about": " ".join(text.split("\n\n")[0].split()),
        "paper": " ".join(found[0].split()) if (found := re.search(r"arXiv\s\d{4}\.\d{5}", text)) else None,
        "settings": settings,
        "capability": dataclasses.asdict(capability),
    }


def _setting(field: dataclasses.Field[Any], cls: Any) -> dict[str, Any]:
    hint = typing.get_type_hints(cls.Config)[field.name]
    kind = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    default = None if field.default is dataclasses.MISSING else field.default
    return {"name": field.name, "type": kind, "default": default, "doc": field.metadata.get("doc", "")}


def _print_part(part: dict[str, Any]) -> None:
    typer.echo(f"\nin {part['seam']}/: {part['home']}")
    for setting in part["settings"]:
        default = setting["default"]
        given = f"{default:.4g}" if isinstance(default, float) else default
        typer.echo(f"  {setting['name']}={given}  ({setting['type']}) {setting['doc']}")
    for key, value in part["capability"].items():
        typer.echo(f"  {key.replace('_', ' ')}: {shown(value)}")


def shown(value: Any) -> str:
    """A capability's value in words."""
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list | tuple) else str(value)
