"""Command-line flags made of the records that they fill: a setting is declared once, in `core/`, and nowhere again."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal

import typer

from firstlight.core import registry
from firstlight.core.config import Options
from firstlight.core.settings import gather_options

_CHOICES: dict[str, Callable[[], Sequence[str]]] = {
    "method": registry.names,
    "schedule": lambda: registry.names(schedules=True),
}
_METAVARS: dict[Any, str] = {int | None: "N", float | None: "X", str | None: "TEXT"}


@dataclass(frozen=True)
class Flag:
    """One flag: its name as a Python word, what it takes, its field's text, and which records it fills."""

    name: str
    kind: Any
    doc: str
    metavar: str | None
    default: str
    panel: str
    records: tuple[str, ...]


def flags_of(records: Mapping[str, type]) -> list[Flag]:
    """The flags of some records; a field name that two records share is one flag that fills both."""
    found: dict[str, Flag] = {}
    for record, cls in records.items():
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            owners = (*found[field.name].records, record) if field.name in found else (record,)
            first = found.get(field.name) or _flag(field, hints[field.name], cls)
            found[field.name] = Flag(**{**vars(first), "records": owners})
    return list(found.values())


def with_flags(without: Sequence[str] = (), **records: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the verb's parameters named in `records` (frozen dataclasses) become one flag a field.

    Fields named in `without` are no flags of this verb. Only what was given reaches a record; the rest of it comes from
    where `core/settings.py` says, or is its default.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        flags = [flag for flag in flags_of(records) if flag.name not in without]

        @functools.wraps(verb)
        def wrapper(**given: Any) -> None:
            values = {flag.name: given.pop(flag.name) for flag in flags}
            built = {name: _make(cls, _given(name, flags, values)) for name, cls in records.items()}
            verb(**given, **built)

        _sign(wrapper, verb, flags)
        return wrapper

    return decorate


def complete_with(choices: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """For the shell: those of some words that go on as the user began."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices() if choice.startswith(incomplete)]

    return complete


def panel_of(record: type) -> str:
    """The heading of a record's flags: the first sentence about it."""
    return (record.__doc__ or record.__name__).split(".")[0]


def _make(cls: type, given: dict[str, Any]) -> Any:
    return gather_options(given) if cls is Options else cls(**given)


def _given(record: str, flags: Sequence[Flag], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said about one record."""
    return {f.name: values[f.name] for f in flags if record in f.records and values[f.name] not in (None, [])}


def _sign(wrapper: Any, verb: Callable[..., None], flags: Sequence[Flag]) -> None:
    """Gives the wrapper the signature that typer reads: the verb's own parameters, then the flags."""
    own = inspect.signature(verb, eval_str=True).parameters.values()
    taken = {record for flag in flags for record in flag.records}
    added = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=f.kind, default=_option(f)) for f in flags
    ]
    kept = [p for p in own if p.name not in taken]
    wrapper.__signature__ = inspect.Signature([*kept, *added], return_annotation=None)
    wrapper.__annotations__ = {p.name: p.annotation for p in wrapper.__signature__.parameters.values()}


def _option(flag: Flag) -> Any:
    name = flag.name.replace("_", "-")
    # A variable or the settings file may say yes where this run should not: only options of the engine have them.
    has_no = flag.kind == bool | None and flag.panel == panel_of(Options)
    return typer.Option(
        None,
        f"--{name}/--no-{name}" if has_no else f"--{name}",
        help=f"{flag.doc[:1].upper()}{flag.doc[1:]}{flag.default}.",
        metavar=flag.metavar,
        autocompletion=complete_with(_CHOICES.get(flag.name) or (lambda: (flag.metavar or "").split("|"))),
        show_default=False,
        rich_help_panel=flag.panel,
    )


def _flag(field: Field[Any], hint: Any, cls: type) -> Flag:
    doc, metavar = field.metadata["doc"], field.metadata.get("metavar")
    kind = _kind(hint)
    return Flag(
        field.name, kind, doc, metavar or _choices(hint) or _METAVARS.get(kind), _default(field), panel_of(cls), ()
    )


def _kind(hint: Any) -> Any:
    """The type that typer reads for a field's type; the record itself checks the value."""
    options = [h for h in _members(hint) if h is not type(None)]
    if typing.get_origin(options[0]) in (Sequence, Mapping):
        return list[int] if typing.get_args(options[0]) == (int,) else list[str]
    plain = next((h for h in options if h in (bool, int, float)), str)
    return plain | None


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _choices(hint: Any) -> str | None:
    return "|".join(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None


def _default(field: Field[Any]) -> str:
    """The record's default as the help says it; empty where the text says it already or it is plain."""
    silent = field.default is MISSING or field.default is None or isinstance(field.default, bool | tuple)
    return "" if silent else f"; default: {field.default}"
