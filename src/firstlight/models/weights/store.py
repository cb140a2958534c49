"""The disk cache of packed weights: what a model computes with, as it lies in memory, so that a start maps a file.

One file per (model digest, layout), mapped privately: its pages are shared by every process, and none is read before it
is needed. Pieces lie at multiples of 64 bytes; behind them stands an index of their names, types, shapes and places,
and a tail that says where the index begins. A file is trusted if its index is whole, names this model and layout, and
the file's change time is the one that the index states: then nobody has written to it since. Otherwise its content must
sum to the checksum in the index. Files are written beside their place and moved into it; the cache is bounded and
forgets the least recently used first; where it cannot be written the weights simply stay in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.files import cache_dir, write_atomically

log = logging.getLogger(__name__)
Progress = Callable[[float], None]
Pieces = Callable[[], Iterable[tuple[str, Tensor]]]

_LAYOUT = 3  # raise it when the meaning of the stored bytes changes
_ALIGNMENT = 64
_TAIL = struct.Struct("<QII8s")  # the index's place, its length and checksum, the mark
_MARK = b"FLPACKED"
_DEFAULT_BYTES = 8 << 30
_ABANDONED_S = 3600.0  # a partial file that nobody has written to for so long belongs to a dead process


def cache_bound() -> int:
    """Bytes that the weight cache may hold: $FIRSTLIGHT_CACHE_BYTES or 8 GiB; 0 switches it off."""
    text = os.environ.get("FIRSTLIGHT_CACHE_BYTES")
    if not text:
        return _DEFAULT_BYTES
    if not text.isdecimal():
        raise UserError(f"FIRSTLIGHT_CACHE_BYTES={text!r} is not a number of bytes; give one, e.g. {_DEFAULT_BYTES}")
    return int(text)


def cache_size() -> int:
    """Bytes that the weight cache holds now."""
    return sum(size for _, size, _ in _entries())


def kept(
    digest: str, layout: str, pieces: Pieces, *, expected: int, progress: Progress | None = None
) -> Mapping[str, Tensor]:
    """What `pieces` yields by name, made once for each (model digest, layout) and from then on mapped.

    `expected`: about how many bytes that is. `progress` gets a share in [0, 1] while pieces are made, nothing when they
    are mapped.
    """
    about = {"layout": f"{_LAYOUT}-{layout}", "model": digest}
    path = cache_dir() / "weights" / f"{digest[:16]}-{layout}.packed"
    with contextlib.suppress(_Unusable, OSError):
        return _mapped(path, about)
    tell = _Shares(expected, progress)
    try:
        _make_room(path, expected)
        with write_atomically(path) as partial:
            _write(partial, about, tell.through(pieces()))
            written = partial.stat().st_size
            _make_room(path, written, written)
        return _mapped(path, about)
    except (_Unusable, OSError) as error:
        if cache_bound():
            log.warning("weights are not cached on disk (%s), so every start will be slow: %s", error, path.parent)
    return dict(tell.through(pieces()))


class _Unusable(Exception):
    """A cache file that cannot be trusted, or cannot be kept."""


class _Shares:
    """Tells how much has been made."""

    def __init__(self, expected: int, tell: Progress | None) -> None:
        self._expected, self._tell = max(expected, 1), tell

    def through(self, pieces: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        done = 0
        for name, piece in pieces:
            yield name, piece
            done += piece.nbytes
            if self._tell:
                self._tell(min(done / self._expected, 1.0))


def _write(partial: Path, about: Mapping[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Stream the pieces out, one in memory at a time, then index and tail."""
    places: dict[str, Any] = {}
    stamp, checksum = time.time_ns(), 0
    with partial.open("wb") as stream:
        for name, piece in pieces:
            places[name] = (str(piece.dtype).removeprefix("torch."), list(piece.shape), stream.tell())
            data = piece.contiguous().view(-1).view(torch.uint8)
            data = F.pad(data, (0, missing)) if (missing := -len(data) % _ALIGNMENT) else data
            stream.write(data.numpy().data)
            checksum += _checksum(data)
        end = stream.tell()
        index = json.dumps({**about, "stamp": stamp, "checksum": _hex(checksum), "pieces": places}).encode()
        stream.write(index + _TAIL.pack(end, len(index), zlib.crc32(index), _MARK))
        stream.flush()
        os.fsync(stream.fileno())  # or a crash could leave a file of the right length and time with nothing in it
        if hasattr(os, "posix_fadvise"):  # written, it lies in small pages; read again, in large ones
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _mark(partial, stamp)


def _mapped(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Views of the file, or _Unusable if it is not what `_write` made for this model and layout."""
    data = _bytes_of(path)
    index, end = _index(data)
    if any(index.get(key) != value for key, value in about.items()):
        raise _Unusable("cache file of another model or layout")
    if path.stat().st_mtime_ns != index["stamp"] and _hex(_checksum(data[:end])) != index["checksum"]:
        raise _Unusable("cache file is damaged")
    with contextlib.suppress(OSError):
        _mark(path, index["stamp"])
    return {name: _piece(data, *where) for name, where in index["pieces"].items()}


def _index(data: Tensor) -> tuple[dict[str, Any], int]:
    """The index, and where it begins."""
    size = len(data)
    if size < _TAIL.size:
        raise _Unusable("cache file is cut short")
    end, length, checksum, mark = _TAIL.unpack(data[size - _TAIL.size :].numpy().tobytes())
    if mark != _MARK or end + length + _TAIL.size != size:
        raise _Unusable("cache file is cut short")
    text = data[end : end + length].numpy().tobytes()
    if zlib.crc32(text) != checksum:
        raise _Unusable("cache file is damaged")
    index: dict[str, Any] = json.loads(text)
    return index, end


def _piece(data: Tensor, kind: str, shape: list[int], start: int) -> Tensor:
    dtype: torch.dtype = getattr(torch, kind)
    count = torch.Size(shape).numel()
    return data[start : start + count * dtype.itemsize].view(dtype).view(shape)


def _bytes_of(path: Path) -> Tensor:
    """All of them, in large pages where the system has such: a decode step reads the whole file."""
    with path.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise _Unusable("cache file is cut short")
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            data.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(data, dtype=torch.uint8)


def _mark(path: Path, stamp: int) -> None:
    """Set the change time to the index's, and the time of use to now."""
    os.utime(path, ns=(time.time_ns(), stamp))


def _checksum(data: Tensor) -> int:
    """The sum of the 64-bit words modulo 2^64: any changed bit shows, at the speed of memory."""
    return int(data.numpy().view(np.uint64).sum())


def _hex(checksum: int) -> str:
    return f"{checksum % (1 << 64):016x}"


def _entries() -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of the cache's files, partial ones included, oldest first."""
    found = []
    for path in (cache_dir() / "weights").glob("*.*"):
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    return sorted(found)


def _make_room(target: Path, needed: int, written: int = 0) -> None:
    """Remove the least recently used files until `needed` bytes fit, or say why they cannot; `written` are there."""
    bound = cache_bound()
    if needed > bound:
        raise _Unusable(f"{needed >> 20} MiB do not fit into FIRSTLIGHT_CACHE_BYTES={bound}")
    target.parent.mkdir(parents=True, exist_ok=True)
    own = (target.name, f".{target.name}-")
    entries = [entry for entry in _entries() if not entry[2].name.startswith(own)]
    total = sum(size for _, size, _ in entries)
    for used, size, path in entries:
        abandoned = path.suffix == ".partial" and time.time() - used > _ABANDONED_S
        if abandoned or (total + needed > bound and path.suffix != ".partial"):
            path.unlink(missing_ok=True)
            total -= size
    if shutil.disk_usage(target.parent).free < needed - written:
        raise _Unusable(f"{needed >> 20} MiB are not free on the disk")
