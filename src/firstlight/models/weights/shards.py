"""The files of a safetensors directory: config.json, one file of tensors or an index of several, and the model card.

`checkpoint` makes a model of them. The library that reads safetensors checks every length against the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from firstlight.core.errors import UserError

_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that must be there; UserError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a model directory needs it") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return value


def shards(path: Path) -> list[Path]:
    """The safetensors files of a directory: one, or those that an index lists."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    listed = read_json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    # Untrusted: a shard is a plain name beside its index, never a path elsewhere.
    if not names or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
        raise UserError(f"{index}: its weight_map does not list files beside it; fetch the file again")
    return [path / name for name in sorted(set(names))]


def open_tensors(files: list[Path]) -> dict[str, Any]:
    """An open file for each tensor name; a tensor in two files is a damaged model, since only one can be right."""
    handles: dict[str, Any] = {}
    for file in files:
        for name, handle in _opened(file):
            if name in handles:
                raise UserError(f"{file}: tensor {name[:80]} is in another file too; fetch the model again")
            handles[name] = handle
    return handles


def card_license(card: Path) -> str | None:
    """The license that a model card names in the header that hub repositories give it."""
    try:
        with card.open(encoding="utf-8", errors="replace") as stream:
            header = stream.read(1 << 16).partition("---\n")[2].partition("\n---")[0]
    except OSError:
        return None
    fields = dict(line.partition(": ")[::2] for line in header.split("\n"))
    name = fields.get("license_name") if fields.get("license") == "other" else fields.get("license")
    return name.strip().strip("'\"") if name else None


def _opened(file: Path) -> list[tuple[str, Any]]:
    try:
        handle = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; only safetensors are read, convert or fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged safetensors file ({str(error)[:80]}); fetch it again") from None
    return [(name, handle) for name in handle.keys()]  # type: ignore[no-untyped-call]  # noqa: SIM118 (not a dict)
