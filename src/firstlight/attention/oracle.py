"""`oracle`: each row reads the entries on which dense attention puts most. For measuring only: slower than dense.

It computes dense attention to choose what attention may read (Oracle-Guided Sparse Prefill, arXiv 2606.07703),
so it tells how good a plan of a given size, shape and sharing can be at all: every planner is judged by its
distance to it. No clock is asked whether it pays, for it never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from firstlight.attention.grid import Grid, csr
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.ranking import best

ROWS, BLOCKS, HEADS, POOLS = (1, 16, 64, 128), (1, 16, 64, 128), ("layer", "group", "head"), ("mean", "max")
_STRIP = 128
"""Rows whose dense attention is held at a time: whole tiles."""


@dataclass(frozen=True)
class OracleConfig:
    """Raises UserError on values that can't be."""

    k: int = field(default=1024, metadata={"doc": "entries that a list has; 1048576 = all"})
    rows: int = field(default=1, metadata={"doc": f"rows that share a list, one of {ROWS}; from 16 on chunks matter"})
    block: int = field(default=1, metadata={"doc": f"entries that are chosen together, one of {BLOCKS}"})
    heads: str = field(default="layer", metadata={"doc": "who shares a list: layer, group (of a KV head) or head"})
    pool: str = field(default="mean", metadata={"doc": "rows that share a list: mean or max of what they look at"})

    def __post_init__(self) -> None:
        choices = {"rows": ROWS, "block": BLOCKS, "heads": HEADS, "pool": POOLS}
        for key, known in choices.items():
            if (value := getattr(self, key)) not in known:
                raise UserError(f"oracle: {key}={value} can't be; choose one of {', '.join(map(str, known))}")
        if self.k < self.block:
            raise UserError(f"oracle: k={self.k} is less than a block; give {self.block} or more")


class Oracle(Planner):
    """The attention part."""

    name = "oracle"
    seam = "attention"
    prompt_only = True
    Config = OracleConfig
    identity: ClassVar = {"k": 1 << 20}
    trial: ClassVar = {"k": 24}
    capability = Capability(exact=False, prefix_stable=True, chunk_invariant=True)

    def __init__(self, config: OracleConfig) -> None:
        self.config = config
        if config.rows > 1:  # a list hangs on all rows of its tile that are in the pass
            self.capability = replace(self.capability, prefix_stable=False, chunk_invariant=False)

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) where a list holds the whole prompt."""
        c = self.config
        if ctx.place is None or ctx.prompt_len <= c.k:
            return None
        grid = Grid(ctx, c.rows, BLOCK if c.block == 1 else c.block)
        chosen = [csr(self._chosen(grid, *strip)) for strip in _strips(ctx, grid, c.heads)]
        counts = torch.cat([ptr.diff() for ptr, _ in chosen])
        ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        idx = torch.cat([idx for _, idx in chosen])
        # Rows that share a list might find nothing in it: they read the first token and their own.
        plan = grid.plan(band=(1, 1) if c.rows > 1 else (0, 0), head_map=_head_map(ctx, c.heads))
        return replace(plan, col_ptr=ptr, col_idx=idx) if c.block == 1 else replace(plan, blk_ptr=ptr, blk_idx=idx)

    def _chosen(self, grid: Grid, tiles: slice, mass: Tensor, tile: Tensor) -> Tensor:
        """bool [tiles, L, entries or blocks], for mass [L, rows, entries] of rows in tiles i64 [rows]."""
        c = self.config
        pooled = mass.new_zeros(len(mass), tiles.stop - tiles.start, mass.shape[2])
        if c.pool == "mean":  # tiles have a number of rows of their own, which changes no order
            pooled.index_add_(1, tile, mass)
        else:
            pooled.scatter_reduce_(1, tile[None, :, None].expand_as(mass), mass, "amax")
        entry = torch.arange(mass.shape[2])
        if c.block > 1:
            blocks = -(-mass.shape[2] // c.block)
            pooled = torch.nn.functional.pad(pooled, (0, blocks * c.block - mass.shape[2]))
            pooled, entry = pooled.view(*pooled.shape[:2], blocks, c.block).sum(3), torch.arange(blocks) * c.block
        ahead = entry >= grid.end[tiles, None]
        return (best(pooled.masked_fill_(ahead, -1.0), c.k // c.block) & ~ahead).transpose(0, 1)


def attention_mass(ctx: PlanContext, rows: slice, heads: str) -> Tensor:
    """[L, rows, entries]: dense attention of some rows, averaged over the query heads that share a list.

    One precision above the rows' own, so that no rounding says which of two entries is better.
    """
    assert ctx.place is not None
    wide = torch.float64 if ctx.q.dtype == torch.float32 else torch.float32
    place, group = ctx.place[rows], ctx.q.shape[1] // ctx.num_kv_heads
    n = int(place[-1]) + 1 if len(place) else 1
    ahead = torch.arange(n) > place[:, None]
    made = []
    for h, k in enumerate(ctx.keys()[:, :n]):
        q = ctx.q[rows, h * group : (h + 1) * group].transpose(0, 1).to(wide)
        share = (q @ k.to(wide).T).mul_(ctx.scale).masked_fill_(ahead, -torch.inf).softmax(-1)
        made.append(share if heads == "head" else share.mean(0, keepdim=True))
    mass = torch.cat(made)
    return mass.mean(0, keepdim=True) if heads == "layer" else mass


def _strips(ctx: PlanContext, grid: Grid, heads: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tiles, the mass [L, rows, entries] of their rows, and which of these tiles each row i64 [rows] is in."""
    step = _STRIP // grid.q_tile
    ends = torch.nn.functional.pad(grid.rows.cumsum(0), (1, 0)).tolist()
    for begin in range(0, grid.tiles, step):
        tiles = slice(begin, min(begin + step, grid.tiles))
        rows = slice(ends[tiles.start], ends[tiles.stop])
        yield tiles, attention_mass(ctx, rows, heads), grid.tile[rows] - begin


def _head_map(ctx: PlanContext, heads: str) -> Tensor:
    """i16 [Hq]."""
    head = torch.arange(ctx.q.shape[1])
    lists = {"layer": head * 0, "group": head // (len(head) // ctx.num_kv_heads), "head": head}
    return lists[heads].to(torch.int16)
