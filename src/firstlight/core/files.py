"""Files that others may read while we write them: weights, notes, documents; and the folder of those we derive."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """Where derived files live: $FIRSTLIGHT_CACHE or ~/.cache/firstlight. Not created here."""
    return Path(os.environ.get("FIRSTLIGHT_CACHE") or Path.home() / ".cache" / "firstlight")


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
