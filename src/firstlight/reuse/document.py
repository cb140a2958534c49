"""A prefilled document as a file: token ids, and the K/V of their columns as the layout's own bytes.

The answer to "which cells are already known?" that survives the process. A file is

    magic (8 bytes) | format (u32) | length of the head (u32) | head (JSON, padded)
    | which blocks are there (1 bit for each column, layer, KV head) | ids (i32) | zeros up to a multiple of 64
    | blocks, in the same order | sha256 of all that stands before the blocks, and of each block's sum

all little-endian. It is written beside its place and moved into it, mapped when it is read, and believed only when
every length follows from the head and the file's own size, and the checksum agrees: a file from anywhere may be opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import stat
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.files import write_atomically
from firstlight.kernels.kv_layout import BLOCK

MAGIC = b"FLDOC\r\n\x1a"
FORMAT = 1
_START = struct.Struct("<8sII")
_ALIGNED = 64
_GROUP = 256
"""Blocks that are copied at a time."""
_MOST_HEAD = 1 << 20


class Layout(Protocol):
    """What this needs of the K/V storage."""

    def export(self, blocks: Tensor) -> NDArray[np.uint8]: ...
    def restore(self, blocks: Tensor, data: NDArray[np.uint8]) -> None: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """What cells depend on, besides their tokens. `shape`: layers, KV heads, bytes of a block."""

    model: str
    digest: str
    dtype: str
    recipe: str
    methods: str
    layout: str
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Stored:
    """A document's file, mapped: `ids` i32, which blocks it has (`held`: bool [L, Hkv, columns]), and their bytes."""

    ids: NDArray[np.int32]
    is_chat: bool
    held: NDArray[np.bool_]
    blocks: NDArray[np.uint8]

    def fill(self, layout: Layout, table: NDArray[Any]) -> None:
        """Put the cells into the blocks of a table i32 [L, Hkv, columns] that has one for each that is held."""
        where = _in_order(table)
        for at in range(0, len(where), _GROUP):
            layout.restore(where[at : at + _GROUP], self.blocks[at : at + _GROUP])


def write_document(
    path: Path, origin: Origin, ids: list[int], is_chat: bool, table: NDArray[Any], layout: Layout
) -> None:
    """Write cells and their ids, whole or not at all. Raises UserError if the file can't be written."""
    blocks = _in_order(table)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"can't write {path}: it is no regular file; give another name")
        with write_atomically(path) as partial, partial.open("wb") as stream:
            before = _before_blocks(origin, ids, is_chat, table > 0)
            stream.write(before)
            checksum = hashlib.sha256(before)
            for at in range(0, len(blocks), _GROUP):
                data = layout.export(blocks[at : at + _GROUP])
                checksum.update(_sums(data))
                stream.write(data.data)
            stream.write(checksum.digest())
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}; give another name or make room") from None


def read_document(path: Path, expected: Origin) -> Stored:
    """Map a file and check all of it. Raises UserError if it is no document, damaged, or not of `expected` origin."""
    data = _mapped(path)
    try:
        head, at = _head(data)
        stored, end = _parts(data, head, at)
        checksum = hashlib.sha256(data[: end - stored.blocks.size].data)
        for first in range(0, len(stored.blocks), _GROUP):
            checksum.update(_sums(stored.blocks[first : first + _GROUP]))
        _expect(checksum.digest() == data[end:].tobytes(), "its checksum is wrong")
    except _Unreadable as error:
        raise UserError(f"{path} {error}") from None
    _same_origin(path, _origin(head), expected)
    return stored


class _Unreadable(Exception):
    """Why a file is no document that can be used, and the cure."""


def _expect(fine: bool, why: str) -> None:
    if not fine:
        raise _Unreadable(f"is damaged ({why}); prefill the text again")


# --- writing ----------------------------------------------------------------------------------------------------------


def _before_blocks(origin: Origin, ids: list[int], is_chat: bool, held: NDArray[np.bool_]) -> bytes:
    head = json.dumps(asdict(origin) | {"num_tokens": len(ids), "chat": is_chat}).encode()
    head += b" " * (-(_START.size + len(head)) % _ALIGNED)
    bits = np.packbits(held.transpose(2, 0, 1).ravel()).tobytes()
    text = _START.pack(MAGIC, FORMAT, len(head)) + head + bits + np.asarray(ids, "<i4").tobytes()
    return text + bytes(-len(text) % _ALIGNED)


def _in_order(table: NDArray[Any]) -> Tensor:
    """The blocks i64 [n] of a table, column after column: as they lie in the file."""
    numbers = table.transpose(2, 0, 1).ravel()
    return torch.from_numpy(numbers[numbers > 0].astype(np.int64))


def _sums(blocks: NDArray[np.uint8]) -> bytes:
    """The sum of each block's 64-bit words modulo 2^64: any changed bit shows, at the speed of memory."""
    sums: NDArray[np.uint64] = blocks.view("<u8").sum(axis=1, dtype=np.uint64)
    return sums.astype("<u8").tobytes()


# --- reading ----------------------------------------------------------------------------------------------------------


def _mapped(path: Path) -> NDArray[np.uint8]:
    """All bytes of a file, read when they are looked at."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path} is no regular file; give one that `firstlight prefill` wrote")
        with path.open("rb") as stream:
            if not (size := path.stat().st_size):
                raise UserError(f"{path} is empty; prefill the text again")
            return np.frombuffer(mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY), np.uint8)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; give a file that `firstlight prefill` wrote") from None


def _head(data: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """The head, and where it ends."""
    start = data[: _START.size].tobytes()
    if not start.startswith(MAGIC):
        raise _Unreadable("is no prefilled document; make one with `firstlight prefill`")
    _expect(len(start) == _START.size, "it is cut off")
    _, number, length = _START.unpack(start)
    if number > FORMAT:
        raise _Unreadable(f"has format {number}, this version reads {FORMAT}; update Firstlight, or prefill again")
    end = _START.size + length
    _expect(number == FORMAT and length <= _MOST_HEAD and end <= len(data), "its head is cut off")
    try:
        head = json.loads(data[_START.size : end].tobytes())
    except (ValueError, RecursionError):
        head = None
    _expect(isinstance(head, dict), "its head can't be read")
    return head, end


def _parts(data: NDArray[np.uint8], head: dict[str, Any], at: int) -> tuple[Stored, int]:
    """What the head says is there, checked against the size of the file; where the checksum begins."""
    num_tokens, is_chat, shape = head.get("num_tokens"), head.get("chat"), head.get("shape")
    sizes = [num_tokens, *(shape if isinstance(shape, list) and len(shape) == 3 else [0])]
    # Nothing here can be larger than the file: then no product of these is a number to fear.
    _expect(all(type(size) is int and 0 < size <= len(data) for size in sizes), "its sizes make no sense")
    tokens, layers, heads, nbytes = sizes
    columns = -(-tokens // BLOCK)
    num_bits = columns * layers * heads
    ids_at = at + -(-num_bits // 8)
    blocks_at = _aligned(ids_at + 4 * tokens)
    fits = num_bits <= len(data) and blocks_at <= len(data)
    _expect(isinstance(is_chat, bool) and nbytes % 8 == 0 and fits, "its sizes make no sense")
    bits = np.unpackbits(data[at:ids_at], count=num_bits).view(bool)
    end = blocks_at + int(np.count_nonzero(bits)) * nbytes
    _expect(end + hashlib.sha256().digest_size == len(data), "it is not as long as it says")
    ids = data[ids_at : ids_at + 4 * tokens].view("<i4")
    held = bits.reshape(columns, layers, heads).transpose(1, 2, 0)
    return Stored(ids, bool(is_chat), held, data[blocks_at:end].reshape(-1, nbytes)), end


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNED) * _ALIGNED


def _origin(head: dict[str, Any]) -> Origin | None:
    """Where the document says it comes from; None if it doesn't say it in full."""
    try:
        given = {field.name: head[field.name] for field in fields(Origin)}
    except KeyError:
        return None
    return Origin(**given | {"shape": tuple(given["shape"])})


def _same_origin(path: Path, found: Origin | None, expected: Origin) -> None:
    """Raises UserError that names the first thing in which the two differ."""
    again = "or prefill the text again"
    if found is None:
        raise UserError(f"{path} doesn't say where it comes from; prefill the text again")
    if found.digest != expected.digest or found.shape[:2] != expected.shape[:2]:
        names = [f"{_shown(o.model)} (sha256 {_shown(o.digest)[:12]})" for o in (found, expected)]
        raise UserError(f"{path} was prefilled with {names[0]}, this is {names[1]}; load it there, {again}")
    for what, mine, theirs in (
        ("precision", expected.dtype, found.dtype),
        ("method", expected.methods, found.methods),
        ("K/V layout", expected.layout, found.layout),
    ):
        if mine != theirs:
            raise UserError(
                f"{path} was prefilled in another {what} ({_shown(theirs)}, this is {_shown(mine)}); use that, {again}"
            )
    if (found.recipe, found.shape) != (expected.recipe, expected.shape):
        raise UserError(f"{path} holds other cells than this model's; prefill the text again")


def _shown(text: object) -> str:
    """A word of a foreign file, fit for one line."""
    return "".join(char for char in str(text) if char.isprintable())[:80]
