"""The sha256 of a model's files, which names everything that is derived from them: weights, calibrations, stored KV.

Hashing 100 MB takes a noticeable part of a start, so a digest is remembered beside the cache, by path, size and change
time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from firstlight.core.files import cache_dir, write_atomically


def digest_of(files: Sequence[Path]) -> str:
    """sha256 (hex) of one file; of several, the sha256 of their names and digests in the order given."""
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file_digest(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes, remembered until its size or change time differs."""
    stat = path.stat()
    full = str(path.resolve())
    known = {"path": full, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = cache_dir() / "digests" / f"{hashlib.sha256(full.encode(errors='surrogateescape')).hexdigest()[:16]}.json"
    digest = _remembered(note, known)
    if digest is None:
        digest = hash_file(path)
        _remember(note, {**known, "sha256": digest})
    return digest


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read now."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remembered(note: Path, known: dict[str, object]) -> str | None:
    try:
        stored = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    digest = stored.get("sha256") if isinstance(stored, dict) else None
    right = isinstance(digest, str) and len(digest) == 64 and stored == {**known, "sha256": digest}
    return str(digest) if right else None


def _remember(note: Path, entry: dict[str, object]) -> None:
    try:
        with write_atomically(note) as partial:
            partial.write_text(json.dumps(entry))
    except OSError:
        return  # only a memo: without it the next start hashes again
