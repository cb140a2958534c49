"""A setting's value by its field's type, whether it was typed in a shell, stands in a file or comes from Python.

Before a prompt's way begins: flags, variables, files and keywords all come through here.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firstlight.core.errors import UserError

_BOOLS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
_PLAIN: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str, Path, int, float)}


def read_value(name: str, hint: Any, value: Any) -> Any:
    """The value in the type that `hint` says; text is read, other values are checked. UserError that calls it `name`.

    A list is written `a;b` as text. What isn't a plain type (a Literal, a tuple) passes: the record has its own check.
    """
    if typing.get_origin(hint) is Sequence:
        items = value.split(";") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise UserError(f"{name}={value!r} is not a list; give one")
        (each,) = typing.get_args(hint)
        read = (read_value(name, each, item.strip() if isinstance(item, str) else item) for item in items)
        return tuple(read) if isinstance(items, tuple) else list(read)
    return _from_text(name, hint, value) if isinstance(value, str) else _from_python(name, hint, value)


def _from_text(name: str, hint: Any, text: str) -> Any:
    kinds = _kinds(hint)
    if text.lower() in ("none", "off") and type(None) in typing.get_args(hint):
        return None
    if bool in kinds and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    for kind in (k for k in kinds if k in (int, float, str)):
        try:
            return kind(text)
        except ValueError:
            continue
    if text in kinds:
        return text
    raise UserError(f"{name}={text!r} is not {_hint_name(hint)}; give such a value")


def _from_python(name: str, hint: Any, value: Any) -> Any:
    kinds = _kinds(hint)
    if (value is None and type(None) in typing.get_args(hint)) or not all(isinstance(kind, type) for kind in kinds):
        return value
    for kind in kinds:
        if isinstance(value, _PLAIN.get(kind, kind)) and isinstance(value, bool) == (kind is bool):
            return kind(value) if kind in _PLAIN else value
    raise UserError(f"{name}={value!r} is not {_hint_name(hint)}; give such a value")


def _kinds(hint: Any) -> list[Any]:
    """The types of a union, the values of a Literal, or the type itself; without None."""
    return [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]


def _hint_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "on or off", str: "text"}
    kinds = _kinds(hint)
    return names[kinds[0]] if len(kinds) == 1 and kinds[0] in names else f"one of {typing.get_args(hint) or hint}"
