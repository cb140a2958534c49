"""The disk cache of dequantised weights: the second start maps a file instead of unpacking a model for seconds.

One safetensors file per (model digest, dtype), mapped privately, so that its pages are shared by every process and read
on demand. A file is trusted only if its header is, byte for byte, the one that this model and dtype would be given now
and its content sums to the checksum in that header. Files are written beside their place and moved into it; the cache
is bounded and forgets the least recently used first; where it cannot be written the weights simply stay in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from firstlight.core.errors import UserError
from firstlight.core.files import cache_dir, write_atomically

if TYPE_CHECKING:
    from firstlight.models.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)
Progress = Callable[[float], None]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_LAYOUT = "1"  # raise it when the meaning of the stored bytes changes
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


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, *, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of the model by Hugging Face name, in `dtype`, except 1-d ones (norm gains), which stay float32.

    They are views of a mapped file where the cache works, and in memory where it does not. `progress` gets a share in
    [0, 1] while weights are unpacked, nothing when they are mapped.
    """
    path = cache_dir() / "weights" / f"{checkpoint.digest[:16]}-{_NAMES[dtype].lower()}.safetensors"
    plan = _Plan(checkpoint, dtype)
    with contextlib.suppress(_Unusable, OSError):
        return plan.mapped(path)
    try:
        _make_room(path, plan.nbytes)
        with write_atomically(path) as partial:
            plan.write(partial, progress)
        return plan.mapped(path)
    except (_Unusable, OSError) as error:
        if cache_bound():
            log.warning("weights are not cached on disk (%s), so every start will be slow: %s", error, path.parent)
    return {name: plan.unpacked(name) for name in _counted(checkpoint.names(), progress)}


class _Unusable(Exception):
    """A cache file that cannot be trusted, or cannot be kept."""


class _Plan:
    """The one possible cache file of a (model, dtype): its header, and where each tensor lies."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        # 1-d tensors first: everything then lies at a multiple of its own element size.
        self.shapes = dict(sorted(checkpoint.shapes.items(), key=lambda item: len(item[1]) > 1))
        self.start = len(self.header(0))
        self.nbytes = self.start + self._end

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if len(self.shapes[name]) == 1 else self.dtype

    def unpacked(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name).to(self.dtype_of(name)).contiguous()

    def header(self, checksum: int) -> bytes:
        """A safetensors header of this plan; its length does not depend on the checksum."""
        about = {"layout": _LAYOUT, "model": self.checkpoint.digest, "checksum": f"{checksum:016x}"}
        entries: dict[str, Any] = {"__metadata__": about}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + math.prod(shape) * self.dtype_of(name).itemsize
            self._offsets[name] = start
            entries[name] = {"dtype": _NAMES[self.dtype_of(name)], "shape": shape, "data_offsets": [start, end]}
        self._end = end
        text = json.dumps(entries).encode()
        text += b" " * (-(len(text) + 8) % 64)
        return len(text).to_bytes(8, "little") + text

    def write(self, partial: Path, progress: Progress | None) -> None:
        """Stream the tensors out, one in memory at a time, then complete the header with the checksum."""
        with partial.open("wb") as stream:
            stream.write(self.header(0))
            for name in _counted(list(self.shapes), progress):
                stream.write(self.unpacked(name).view(-1).view(torch.uint8).numpy().data)
        checksum = _checksum(_mapped_bytes(partial)[self.start :])
        with partial.open("r+b") as stream:
            stream.write(self.header(checksum))

    def mapped(self, path: Path) -> dict[str, torch.Tensor]:
        """Views of the file, or _Unusable if it is not exactly what `write` would have made."""
        if path.stat().st_size != self.nbytes:
            raise _Unusable("cache file of a wrong size")
        data = _mapped_bytes(path)
        if data[: self.start].numpy().tobytes() != self.header(_checksum(data[self.start :])):
            raise _Unusable("cache file is damaged")
        with contextlib.suppress(OSError):
            os.utime(path)  # marks it as recently used
        return {name: self._view(data, name) for name in self.checkpoint.names()}

    def _view(self, data: torch.Tensor, name: str) -> torch.Tensor:
        shape, dtype = self.shapes[name], self.dtype_of(name)
        start = self.start + self._offsets[name]
        return data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _mapped_bytes(path: Path) -> torch.Tensor:
    try:
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except RuntimeError as error:  # torch's word for a file that cannot be mapped
        raise _Unusable(str(error).splitlines()[0]) from None


def _checksum(data: torch.Tensor) -> int:
    """The sum of the 64-bit words modulo 2^64, tail bytes added: any changed bit shows, at the speed of memory."""
    words = len(data) // 8 * 8
    values = data.numpy()
    return int((int(values[:words].view(np.uint64).sum()) + int(values[words:].sum())) % (1 << 64))


def _counted(names: list[str], progress: Progress | None) -> Iterator[str]:
    for index, name in enumerate(names):
        yield name
        if progress:
            progress((index + 1) / len(names))


def _entries() -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of the cache's files, partial ones included, oldest first."""
    found = []
    for path in (cache_dir() / "weights").glob("*.*"):
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    return sorted(found)


def _make_room(target: Path, needed: int) -> None:
    """Remove the least recently used files until `needed` bytes fit, or say why they cannot."""
    bound = cache_bound()
    if needed > bound:
        raise _Unusable(f"{needed >> 20} MiB do not fit into FIRSTLIGHT_CACHE_BYTES={bound}")
    target.parent.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in _entries() if entry[2] != target]
    total = sum(size for _, size, _ in entries)
    for used, size, path in entries:
        abandoned = path.suffix == ".partial" and time.time() - used > _ABANDONED_S
        if abandoned or (total + needed > bound and path.suffix != ".partial"):
            path.unlink(missing_ok=True)
            total -= size
    if shutil.disk_usage(target.parent).free < needed:
        raise _Unusable(f"{needed >> 20} MiB are not free on the disk")
