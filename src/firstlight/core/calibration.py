"""What a method found out about one model before use: a small JSON file that `firstlight calibrate` writes.

The registry reads it, once, as it makes a method's parts: the file that `calibration=FILE` names, else the one in the
cache folder, else one that ships with Firstlight for a model of this sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from firstlight.core.errors import UserError
from firstlight.core.files import cache_dir, write_atomically

FORMAT = 1
"""Raise it when older programs would misread a file."""

KEY = "calibration"
KEY_DOC = "file that `firstlight calibrate` wrote; default: the cache's, else the one that ships for the model, if any"

Reader = Callable[[Path], Mapping[str, Any] | None]
"""A file that isn't ours -> its values; None if it can't be read so."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Calibration:
    """What was found (`values`), for which method and model, under which settings, on which texts."""

    method: str
    model: str
    """sha256 of the model's files."""
    settings: Mapping[str, Any]
    texts: Mapping[str, str]
    """Name -> sha256: evaluation refuses to judge on these."""
    values: Mapping[str, Any]
    path: str = ""
    """Where it was read."""

    @property
    def digest(self) -> str:
        """Names the values: two files with the same ones have the same effect."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()

    def value(self, key: str, kind: type[_T]) -> _T:
        """One value. Raises UserError if it isn't there or is of another type."""
        found = self.values.get(key)
        if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
            raise UserError(f"the calibration {self.path} has no {key} that {self.method} can use; {_again(self)}")
        return found


def default_path(method: str, model: str) -> Path:
    """Where the calibration of a method for the model of this sha256 lies unless somebody says otherwise."""
    return cache_dir() / model / method


def find(method: str, model: str, file: str | None, published: Reader | None = None) -> Calibration | None:
    """The calibration to use; None if there is none. UserError on a named file that isn't there, or on a wrong one.

    `published` is asked first about a named file: a method may know how others write what it needs.
    """
    usual = default_path(method, model)
    if file is not None and published is not None and (values := published(Path(file))) is not None:
        return Calibration(method, model, {}, {}, values, file)
    if file is not None or usual.is_file():
        path = usual if file is None else Path(file)
        return _checked(_read(path), method, model)
    return _shipped(method, model)


def write(path: Path, found: Calibration) -> None:
    """Raises UserError where it can't be written."""
    body = {"format": FORMAT} | {key: value for key, value in asdict(found).items() if key != "path"}
    try:
        with write_atomically(path) as partial:
            partial.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}; give another -o FILE") from None


def _read(path: Path) -> Calibration:
    """A file's content, whatever it is for."""
    try:
        body = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"can't read the calibration {path}: {error.strerror}; name another file") from None
    except ValueError:
        body = None
    return _made(body, str(path))


def _made(body: Any, path: str) -> Calibration:
    if isinstance(body, dict) and isinstance(body.get("format"), int) and body["format"] > FORMAT:
        raise UserError(f"the calibration {path} is of a newer Firstlight (format {body['format']}); update this one")
    words, tables = ("method", "model"), ("settings", "texts", "values")
    if not (
        isinstance(body, dict)
        and body.get("format") == FORMAT
        and all(isinstance(body.get(key), str) for key in words)
        and all(isinstance(body.get(key), dict) for key in tables)
    ):
        raise UserError(f"{path} is no calibration, or a damaged one; write it again with `firstlight calibrate`")
    return Calibration(**{key: body[key] for key in (*words, *tables)}, path=path)


def _checked(found: Calibration, method: str, model: str) -> Calibration:
    if found.method != method:
        raise UserError(f"the calibration {found.path} is for {found.method}, not for {method}; name another file")
    if found.model != model:
        raise UserError(
            f"the calibration {found.path} is of another model ({found.model[:12]}, this one is {model[:12]}); "
            f"{_again(found)}"
        )
    return found


def _shipped(method: str, model: str) -> Calibration | None:
    """One of those in `calibrations/`, named `<model>-<method>.json` for people and found by what is in them."""
    folder = resources.files("firstlight").joinpath("calibrations")
    for entry in folder.iterdir():
        if entry.name.endswith(f"-{method}.json"):
            found = _made(json.loads(entry.read_text("utf-8")), entry.name)
            if found.method == method and found.model == model:
                return found
    return None


def _again(found: Calibration) -> str:
    return f"make one with `firstlight calibrate MODEL {found.method}`"
