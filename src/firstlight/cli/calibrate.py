"""`firstlight calibrate`: what a method has to find out about a model before use, found and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.core.config import Options
from firstlight.core.registry import Method


@with_flags(options=Options, without=["method"])
def calibrate(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    method: Annotated[str, typer.Argument(help="The method, with settings of its procedure.", metavar="METHOD[:k=v]")],
    options: Options,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Where to; default: where the method looks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as one JSON document.")] = False,
) -> None:
    """Find what a method needs to know of a model, on texts that no evaluation judges by.

    A run that was stopped goes on where it was. The file is used by itself from then on; one that was written elsewhere
    is named with `--method NAME:calibration=FILE`.

    firstlight calibrate smollm2 fastkv
    """
    from firstlight import LLM  # here, because it brings torch
    from firstlight.train.calibrating import calibrate as run
    from firstlight.train.calibrating import procedure_of

    wanted = Method.parse(method)
    procedure_of(wanted)
    settings = {field.name: getattr(options, field.name) for field in fields(options)} | {"method": ()}
    with Bars() as bars, LLM(model, progress=bars, **settings) as llm:
        found = run(llm, wanted, out, bars.tell)
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else f"{found.path}: {_text(found.values)}")


def _text(values: Mapping[str, Any]) -> str:
    """Single values; tables are in the file."""
    return ", ".join(f"{key}={value}" for key, value in values.items() if isinstance(value, int | float | str))
