"""Tiles of rows and the keys they read: who lies where, in shapes that depend on ordinals alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [lo, hi) of a call: those of request b whose ordinals lie in [start, start + size)."""

    call: AttnCall
    b: int
    lo: int
    hi: int
    start: int
    size: int

    @property
    def view(self) -> KVView:
        return self.call.kv[self.b]

    @property
    def tok(self) -> Tensor:
        return self.call.rows.tok[self.lo : self.hi]

    @property
    def pos(self) -> Tensor:
        return self.call.rows.pos[self.lo : self.hi]

    @property
    def place(self) -> Tensor:
        """i64 [n]: where in the tile the rows lie."""
        return self.tok - self.start

    @property
    def is_plain(self) -> bool:
        """Every row sees every entry up to its own: nothing dropped, hidden, windowed or planned."""
        call, view = self.call, self.view
        return call.plan is None and view.tok is None and view.visible is None and call.model_window is None


def tile_span(tok: int) -> tuple[int, int]:
    """First ordinal and length of the tile that a prompt row lies in: shorter where a row costs more."""
    size = 128 if tok < 8192 else 64 if tok < 16384 else 32
    return tok - tok % size, size


def tiles(call: AttnCall, r0: int, r1: int) -> list[Tile]:
    """The tiles of rows [r0, r1), in order; a decode row is a tile of its own."""
    spans = call.rows.memo.get((r0, r1))
    if spans is None:
        spans = call.rows.memo[r0, r1] = list(_spans(call.rows, r0, r1))
    return [Tile(call, *span) for span in spans]


def _spans(rows: AttnRows, r0: int, r1: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(b, lo, hi, start, size) of each tile."""
    for b, decode in enumerate(rows.decode):
        lo, end = max(rows.row_ptr[b], r0), min(rows.row_ptr[b + 1], r1)
        base, toks = lo, rows.tok[lo:end].tolist()
        while lo < end:
            start, size = (toks[lo - base], 1) if decode else tile_span(toks[lo - base])
            hi = base + bisect_left(toks, start + size, lo=lo - base)
            yield b, lo, hi, start, size
            lo = hi


def pack(tile: Tile) -> Tensor:
    """Rows at their places -> [Hkv, 1, size * G, D]; places whose row isn't in this slice are zero."""
    q, hkv = tile.call.q[tile.lo : tile.hi], tile.view.table.shape[0]
    if tile.hi - tile.lo < tile.size:
        padded = q.new_zeros(tile.size, *q.shape[1:])
        padded[tile.place] = q
        q = padded
    return q.view(tile.size, hkv, -1, q.shape[2]).transpose(0, 1).reshape(hkv, 1, -1, q.shape[2])


def unpack(tile: Tile, packed: Tensor) -> Tensor:
    """[Hkv, size * G, ...] -> [n, Hq, ...]: the inverse of `pack`, rows of this slice only."""
    by_row = packed.view(packed.shape[0], tile.size, -1, *packed.shape[2:]).transpose(0, 1)
    by_row = by_row if tile.hi - tile.lo == tile.size else by_row[tile.place]
    return by_row.flatten(1, 2)


def blocks(view: KVView, first: int, nb: int) -> Tensor:
    """Blocks [first, first + nb) of each head i32 [Hkv, nb]; past the table's end the zero block."""
    part = view.table[:, first : first + nb]
    return torch.nn.functional.pad(part, (0, nb - part.shape[1])) if part.shape[1] < nb else part


def entries(tile: Tile, a: int, e: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k, v [Hkv, e - a, D] of entries [a, e); what isn't there is zero.

    Blocks without a `seen` entry (bool [H', e - a]) are not read: whatever they hold can't reach the output.
    """
    shift = a % BLOCK
    table = blocks(tile.view, a // BLOCK, -(-(shift + e - a) // BLOCK))
    if seen is not None:
        in_blocks = torch.nn.functional.pad(seen, (shift, table.shape[1] * BLOCK - shift - seen.shape[1]))
        table = table * in_blocks.view(len(seen), -1, BLOCK).any(-1)
    k, v = tile.call.layout.read_blocks(table)
    return k[:, shift : shift + e - a], v[:, shift : shift + e - a]
