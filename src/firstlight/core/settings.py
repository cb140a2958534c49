"""Who sets an option, the strongest first: a keyword or flag, a `FIRSTLIGHT_*` variable, a TOML file, the default.

Before a prompt's way begins. `Options` is the one schema: a field `max_model_len` is the keyword `max_model_len`, the
flag `--max-model-len`, the variable `FIRSTLIGHT_MAX_MODEL_LEN` and the key `max_model_len` of the file.
"""

from __future__ import annotations

import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.values import read_value

PREFIX = "FIRSTLIGHT_"
OTHER_VARIABLES = frozenset({"FIRSTLIGHT_MODELS", "FIRSTLIGHT_CACHE", "FIRSTLIGHT_CACHE_BYTES", "FIRSTLIGHT_ISA"})
"""Variables that set something else than an option."""
USUAL_FILE = "~/.config/firstlight.toml"

# Kubernetes gives every container such variables for a service that is called firstlight: nobody meant an option.
_OF_A_SERVICE = re.compile(r"FIRSTLIGHT_(SERVICE_(HOST|PORT)|PORT)(_.*)?")


def gather_options(given: Mapping[str, Any]) -> Options:
    """The options that `given` (keywords or flags), the environment and the settings file make together.

    UserError names the variable or the file that holds an unknown key or a wrong value. Options that were made here may
    be given again, all of them as keywords: they come back as they are.
    """
    keywords = _checked("", {("method" if key == "methods" else key): value for key, value in given.items()})
    variables = _variables()
    named = keywords.get("config") or variables.get("config")
    path = _file(named)
    return Options(**{**_of_file(path), **variables, **keywords, "config": str(path) if path else None})


def _variables() -> dict[str, Any]:
    """What the environment sets; an empty variable sets nothing."""
    values: dict[str, Any] = {}
    for name, text in sorted(os.environ.items()):
        ours = name.startswith(PREFIX) and name not in OTHER_VARIABLES and not _OF_A_SERVICE.fullmatch(name)
        if ours and text:
            values |= _checked(f"{name}: ", {name.removeprefix(PREFIX).lower(): text})
    return values


def _file(named: str | None) -> Path | None:
    """The settings file: the named one, or the usual one where it exists."""
    path = Path(os.path.expanduser(named or USUAL_FILE))  # noqa: PTH111 - Path.expanduser raises without a home
    return path if named or path.is_file() else None


def _of_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"can't read the settings in {path}: {error.strerror}; name another file") from None
    except ValueError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path} is not TOML ({reason}); write lines like threads = 2") from None
    if "config" in values:
        raise UserError(f"{path}: config can't be set in a settings file; use --config or FIRSTLIGHT_CONFIG")
    return _checked(f"{path}: ", {key.replace("-", "_"): value for key, value in values.items()})


def _checked(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in their fields' types, each of them possible by itself; `where` begins every complaint."""
    hints = typing.get_type_hints(Options)
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}no option is called {key!r}; choose one of: {', '.join(hints)}")
        try:
            read[key] = read_value(key, hints[key], value)
            Options(**{key: read[key]})
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    return read
