"""The ground that planners stand on: tiles of rows over blocks of the view, and the plan that masks over it make.

Tiles are cut by ordinals and absolute, blocks count entries of the view. Rows may be missing (a token policy let them
go) and so may entries: `PlanContext.place` says which entry is a row's own, and causality is told by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.kernels.kv_layout import BLOCK


@dataclass(frozen=True)
class Grid:
    """The tiles of `q_tile` ordinals that a pass has rows in, by blocks of `blk` entries."""

    ctx: PlanContext
    q_tile: int
    blk: int

    @cached_property
    def place(self) -> Tensor:
        """i64 [n]: each row's own entry."""
        assert self.ctx.place is not None, "heads hold different entries: no grid is common to them"
        return self.ctx.place

    @cached_property
    def num_entries(self) -> int:
        """Entries that any row of the pass may read."""
        return int(self.place[-1]) + 1

    @cached_property
    def num_blocks(self) -> int:
        return -(-self.num_entries // self.blk)

    @cached_property
    def first(self) -> int:
        """Number of the first tile."""
        return int(self.ctx.tok[0]) // self.q_tile

    @cached_property
    def tile(self) -> Tensor:
        """i64 [n]: each row's tile, counted from the first one."""
        return self.ctx.tok // self.q_tile - self.first

    @cached_property
    def tiles(self) -> int:
        return int(self.tile[-1]) + 1

    @cached_property
    def rows(self) -> Tensor:
        """i64 [tiles]: how many rows each tile has; 0 where all are gone."""
        return torch.bincount(self.tile, minlength=self.tiles)

    @cached_property
    def begin(self) -> Tensor:
        """i64 [tiles]: the first row's own entry; of an empty tile that of the next row."""
        return self.place[(self.rows.cumsum(0) - self.rows).clamp(max=len(self.place) - 1)]

    @cached_property
    def end(self) -> Tensor:
        """i64 [tiles]: one past the last row's own entry, so past all that the tile may read; 0 of an empty tile."""
        return torch.where(self.rows > 0, self.place[(self.rows.cumsum(0) - 1).clamp(min=0)] + 1, 0)

    @cached_property
    def causal(self) -> Tensor:
        """bool [tiles, nb]: blocks of which a tile's last row may read something."""
        return torch.arange(self.num_blocks) * self.blk < self.end[:, None]

    @cached_property
    def diagonal(self) -> Tensor:
        """bool [tiles, nb]: blocks that hold a tile's own entries, or lie between them."""
        block = torch.arange(self.num_blocks)
        return (block >= self.begin[:, None] // self.blk) & self.causal

    def pooled(self, x: Tensor) -> Tensor:
        """f32 [tiles, ...]: the mean over each tile's rows of x [n, ...]; zeros for an empty tile."""
        sums = torch.zeros(self.tiles, *x.shape[1:]).index_add_(0, self.tile, x.float())
        return sums / self.rows.clamp(min=1).view(-1, *[1] * (x.dim() - 1))

    def mean_keys(self) -> Tensor:
        """f32 [Hkv, nb, D]: the mean key of each block, from digests of blocks of 64, of which `blk` is a multiple."""
        assert self.ctx.digest is not None
        num, times = self.num_blocks, self.blk // BLOCK
        means = self.ctx.digest("mean_k")[:, : num * times]
        means = pad(means, (0, 0, 0, num * times - means.shape[1])).view(len(means), num, times, -1)
        count = (self.num_entries - torch.arange(num * times) * BLOCK).clamp(0, BLOCK).view(num, times)
        return (means * count[:, :, None]).sum(2) / count.sum(1)[:, None]

    def plan(
        self,
        blocks: Tensor | None = None,
        columns: Tensor | None = None,
        band: tuple[int, int] | Tensor = (0, 0),
        head_map: Tensor | None = None,
    ) -> AttnPlan:
        """What masks say, without what no row of a tile may read anyway.

        blocks bool [L, tiles, nb], columns bool [L, tiles or 1 for all, n_kv] (those in listed blocks don't count
        twice: they are taken out), band (sink, window) for all or i32 [L, tiles, 2]; head_map i16 [Hq], by default one
        list a head.
        """
        if head_map is None:
            head_map = torch.arange(self.ctx.q.shape[1], dtype=torch.int16)
        lists, tiles = int(head_map.max()) + 1, self.tiles
        listed: dict[str, Any] = {}
        if blocks is not None:
            blocks = blocks & self.causal
            listed["blk_ptr"], listed["blk_idx"] = csr(blocks.transpose(0, 1))
        if columns is not None:
            listed["col_ptr"], listed["col_idx"] = self._columns(columns, blocks)
        bands = torch.as_tensor(band, dtype=torch.int32).expand(lists, tiles, 2)
        return AttnPlan(
            q_tile=self.q_tile,
            blk=self.blk,
            head_map=head_map,
            tile_base=torch.tensor([0, tiles], dtype=torch.int32),
            tile_first=torch.tensor([self.first], dtype=torch.int32),
            tile_map=torch.arange(tiles, dtype=torch.int32),
            band=bands.transpose(0, 1).reshape(-1, 2).contiguous(),
            **listed,
        )

    def _columns(self, columns: Tensor, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
        """CSR of columns bool [L, tiles or 1, n_kv]. A list's are few of all entries, and looked at alone."""
        place = places(columns.any(1))
        keep = place < self.end[:, None, None]  # [tiles, L, k]
        at = place.clamp(max=columns.shape[2] - 1)
        if columns.shape[1] > 1:
            keep &= columns.transpose(0, 1).gather(2, at.expand(keep.shape))
        if blocks is not None:
            keep &= ~blocks.transpose(0, 1).gather(2, (at // self.blk).expand(keep.shape))
        return pointers(keep), place.expand(keep.shape)[keep].to(torch.int32)


def places(mask: Tensor) -> Tensor:
    """i64 [rows, k]: the true places of bool [rows, n], ascending, and n where a row has no more."""
    row, place = mask.nonzero().unbind(1)
    count = mask.sum(1)
    found = torch.full((len(mask), int(count.max())), mask.shape[1])
    found[row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]] = place
    return found


def csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(ptr i32 [rows + 1], idx i32) of the true places of bool [..., n]: a row for each but the last dimension."""
    return pointers(mask), mask.flatten(0, -2).nonzero()[:, 1].to(torch.int32)


def pointers(mask: Tensor) -> Tensor:
    """i32 [rows + 1]: how many true places of bool [..., n] lie before each row."""
    return pad(mask.flatten(0, -2).sum(1).cumsum(0), (1, 0)).to(torch.int32)


def mask_of(ptr: Tensor | None, idx: Tensor | None, rows: int, width: int) -> Tensor:
    """bool [rows, width]: the places that CSR rows name, as far as there are such; nothing named without lists."""
    mask = torch.zeros(rows, width, dtype=torch.bool)
    if ptr is not None and idx is not None:
        row = torch.arange(rows).repeat_interleave((ptr[1:] - ptr[:-1]).long())
        there = idx < width
        mask[row[there], idx[there].long()] = True
    return mask
