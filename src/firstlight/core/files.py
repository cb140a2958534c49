"""Files: those that others may read while we write them (weights, notes, documents), and those that ship with us."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from firstlight.core.errors import UserError


def cache_dir() -> Path:
    """Where derived files live: $FIRSTLIGHT_CACHE or ~/.cache/firstlight. Not created here."""
    return Path(os.environ.get("FIRSTLIGHT_CACHE") or Path.home() / ".cache" / "firstlight")


def shipped(name: str) -> str:
    """Text of a file that comes with the package, by its path inside it. Raises UserError where it is missing."""
    try:
        return resources.files("firstlight").joinpath(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{name} is missing from this installation of Firstlight; install it again") from None


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A partial file beside `path` to write to; it takes the place of `path` on success and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
