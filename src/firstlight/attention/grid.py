"""The ground that planners stand on: tiles of rows over blocks of the view, and the plan that masks over it make.

Tiles are cut by ordinals and absolute, blocks count entries of the view. Rows may be missing (a token policy let them
go) and so may entries: `PlanContext.place` says which entry is a row's own, and causality is told by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.core.attn import DENSE, AttnPlan, PlanContext
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
        """CSR of columns bool [L, tiles or 1, n_kv]: of a block's in a list all are named or none, up to a tile's end.

        So what is looked at are runs, one a block, and not columns, of which there may be many more.
        """
        below = pad(columns.cumsum(2), (1, 0))  # how many there are before each entry
        begin = torch.arange(self.num_blocks) * self.blk
        end = torch.minimum(begin + self.blk, self.end[:, None]).clamp(max=columns.shape[2]).maximum(begin)
        wide = (len(columns), self.tiles, self.num_blocks)
        upto = below[:, 0, end] if columns.shape[1] == 1 else below.gather(2, end.expand(wide))
        first = below[:, :, begin].expand(wide)
        count = upto - first if blocks is None else (upto - first).masked_fill_(blocks, 0)
        sizes = below[..., -1].flatten()
        first = first + (sizes.cumsum(0) - sizes).view(len(columns), -1, 1)
        named = columns.flatten(0, 1).nonzero()[:, 1].to(torch.int32)
        return _runs(named, first.transpose(0, 1), count.transpose(0, 1))


def _runs(named: Tensor, first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """CSR (ptr, idx) with a row for each but the last dimension of first and count [..., n]: its runs one by one, of
    each count many of `named`, from number `first` on."""
    length = count.flatten()
    ends = length.cumsum(0)
    ptr = pad(ends.view(-1, count.shape[-1])[:, -1], (1, 0)).to(torch.int32)
    shift = (first.flatten() - ends + length).to(torch.int32)
    return ptr, named[shift.repeat_interleave(length) + torch.arange(int(ends[-1]), dtype=torch.int32)]


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


def pairs(plan: AttnPlan, tok: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(near, far f64 [s, Hq], rows f64 [s]): the keys that a kernel takes for each of some rows, stretch after stretch.

    Near ones lie in blocks and bands, far ones are single columns. `tok` i64 [n]: rows of a request, ascending. Blocks
    are taken whole, a row's own included; a window begins anywhere in one.
    """
    alike = math.gcd(plan.q_tile, BLOCK)  # rows that neither a tile's end nor a block's parts
    first, rows = torch.unique_consecutive(tok // alike, return_counts=True)
    tok = first * alike
    tile = plan.tile_map.long()[tok // plan.q_tile - int(plan.tile_first)]
    row = tile[:, None] * plan.num_lists + plan.head_map
    upto = (tok[:, None] // BLOCK + 1.0).double() * BLOCK
    sink, window = plan.band.double().unbind(1)
    near = _lengths(plan.blk_ptr, plan) * plan.blk + sink + torch.where(window > 0, window + BLOCK, 0.0)
    near = torch.minimum(near.masked_fill(window == DENSE, torch.inf)[row], upto)
    return near, torch.minimum(_lengths(plan.col_ptr, plan)[row], upto - near), rows.double()


def _lengths(ptr: Tensor | None, plan: AttnPlan) -> Tensor:
    """f64 [S L]: how many a plan's lists name."""
    return torch.zeros(len(plan.band), dtype=torch.float64) if ptr is None else ptr.diff().double()
