"""Reads the header of a GGUF file: the first thing that happens to a model on its way to memory.

The file is mapped, never read whole, and it is untrusted: every count, length and offset is compared with what is left
of the file before it is used, so a damaged file is refused at once instead of being allocated for. Arrays of numbers
and the tensors' bytes are views of the map; only strings become Python objects. Layout (versions 2 and 3, little
endian): magic, version, number of tensors, number of key-values; the key-values; the tensor table; padding to
`general.alignment`; the tensors' bytes.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from firstlight.core.errors import UserError

# ggml's type number: (name, elements in a block, bytes of a block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Types that exist but are not read here, so that the refusal can name them.
_FOREIGN = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
_FOREIGN |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_FOREIGN |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DEPTH = 4  # arrays of arrays
_MAX_OBJECTS = (
    1 << 21
)  # strings and key-values of one file; the largest vocabularies with their merges have 0.8 million
_MAX_STRING = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: `shape` is row-major ([out, in] for a linear), offset and nbytes count file bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFFile:
    """A mapped GGUF file: `metadata` (strings, numbers, lists of strings, read-only arrays of numbers) and `tensors`.

    Raises UserError for a file that is missing, is not GGUF, is damaged or holds a tensor type that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map(path)
        head = _Header(self._map, path)
        num_tensors, num_pairs = head.start()
        self.metadata: dict[str, Any] = head.pairs(num_pairs)
        infos = head.tensor_table(num_tensors)
        self.tensors = _placed(infos, head, _alignment(self.metadata, head))

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, uint8[nbytes], as a read-only view of the map."""
        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path, or see `firstlight models list`") from None
    except ValueError:
        raise UserError(f"{path}: the file is empty; fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from None


class _Header:
    """A cursor over the header that never steps past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.size, self.pos, self.objects = len(data), 0, 0

    def fail(self, what: str) -> NoReturn:
        raise UserError(f"{self.path}: damaged or cut short ({what}); fetch the file again")

    def start(self) -> tuple[int, int]:
        if self.data[:4] != b"GGUF":
            raise UserError(f"{self.path}: not a GGUF file; give a .gguf file or a directory with config.json")
        self.pos = 4
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            raise UserError(f"{self.path}: a big-endian GGUF file; get the little-endian one")
        if version not in (2, 3):
            raise UserError(f"{self.path}: GGUF version {version} is not known (2 and 3 are); convert the model again")
        return self.number("Q"), self.number("Q")

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes that must exist; their start is returned."""
        start = self.pos
        if count > self.size - start:
            self.fail(f"{what} runs past the end at byte {start}")
        self.pos = start + count
        return start

    def number(self, code: str) -> int:
        start = self.take(struct.calcsize(f"<{code}"), "a number")
        return int(struct.unpack_from(f"<{code}", self.data, start)[0])

    def charge(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count whose items cannot be in the rest of the file, or that no real model has."""
        self.objects += count
        if count * least_bytes > self.size - self.pos or self.objects > _MAX_OBJECTS:
            self.fail(f"impossible number of {what}: {count}")

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        self.charge(count, 8, "strings")
        data, size, pos, unpack = self.data, self.size, self.pos, struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):  # a plain loop on local names: the vocabulary has hundreds of thousands
            if pos + 8 > size:
                self.fail(f"a string runs past the end at byte {pos}")
            end = pos + 8 + unpack(data, pos)[0]
            if end > size or end - pos > _MAX_STRING:
                self.fail(f"impossible length of a string at byte {pos}")
            try:
                out.append(data[pos + 8 : end].decode())
            except UnicodeDecodeError:
                self.fail(f"invalid text at byte {pos}")
            pos = end
        self.pos = pos
        return out

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth + 1)
        return self.scalars(kind, 1)[0].item()

    def scalars(self, kind: int, count: int) -> NDArray[Any]:
        if kind not in _SCALARS:
            self.fail(f"unknown value type {kind} at byte {self.pos}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, "an array")
        values = np.frombuffer(self.data, dtype, count, start)
        return values != 0 if kind == _BOOL else values

    def array(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self.fail(f"arrays nested deeper than {_MAX_DEPTH}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            self.charge(count, 12, "arrays")
            return [self.array(depth + 1) for _ in range(count)]
        return self.scalars(kind, count)

    def pairs(self, count: int) -> dict[str, Any]:
        self.charge(count, 13, "key-values")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if key in metadata:
                self.fail(f"key {key[:80]!r} appears twice")
            metadata[key] = self.value(self.number("I"))
        return metadata

    def tensor_table(self, count: int) -> list[TensorInfo]:
        self.charge(count, 32, "tensors")
        return [self.tensor_info() for _ in range(count)]

    def tensor_info(self) -> TensorInfo:
        """One row of the table; its offset still counts from the start of the data."""
        name = self.string()
        num_dims = self.number("I")
        if not 1 <= num_dims <= 4:
            self.fail(f"tensor {name[:80]!r} has {num_dims} dimensions")
        dims = [self.number("Q") for _ in range(num_dims)]  # innermost first
        kind, offset = self.number("I"), self.number("Q")
        if kind not in TYPES:
            kind_name = _FOREIGN.get(kind, f"number {kind}")
            known = ", ".join(label for label, _, _ in TYPES.values())
            raise UserError(f"{self.path}: tensor {name[:80]!r} has unsupported type {kind_name}; take one of {known}")
        label, block, block_bytes = TYPES[kind]
        if min(dims) == 0 or dims[0] % block:
            self.fail(f"tensor {name[:80]!r} has shape {dims[::-1]}, which {label} cannot hold")
        return TensorInfo(name, tuple(dims[::-1]), label, offset, math.prod(dims) // block * block_bytes)


def _alignment(metadata: dict[str, Any], head: _Header) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment > 1 << 16:
        head.fail("impossible alignment")
    return alignment


def _placed(infos: list[TensorInfo], head: _Header, alignment: int) -> dict[str, TensorInfo]:
    """Absolute offsets, after checking that the tensors lie inside the file and do not overlap."""
    base = -(-head.pos // alignment) * alignment
    end = base
    placed: dict[str, TensorInfo] = {}
    for info in sorted(infos, key=lambda info: info.offset):
        start = base + info.offset
        if start < end or start % alignment or start + info.nbytes > head.size or info.name in placed:
            head.fail(f"tensor {info.name[:80]!r} is outside the file or overlaps another")
        end = start + info.nbytes
        placed[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.nbytes)
    return placed
