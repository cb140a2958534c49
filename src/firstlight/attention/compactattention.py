"""`compactattention`: a chunk reads its own tokens and those blocks before it that any of its tiles wants
(CompactAttention, arXiv 2605.16839).

Which those are, FlashPrefill's rule says: tokens against mean keys. What tiles of a chunk and heads of a KV group want
is then united, so that a kernel reads each block once a chunk and knows no sparsity inside it. `union=false` leaves the
union out: that is FlashPrefill alone, with a list for each tile and head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from firstlight.attention.grid import Grid
from firstlight.attention.growing import coarsen, dense_rows
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.kernels.kv_layout import BLOCK


@dataclass(frozen=True)
class CompactConfig:
    """Counts of blocks. Raises UserError on values that mean nothing."""

    alpha: float = field(
        default=0.06,
        metadata={"doc": "a tile wants blocks that score this share of its best one's; 0 = all (alone: 0.01 is usual)"},
    )
    union: bool = field(
        default=True, metadata={"doc": "a chunk's tiles and a group's heads read what any of them wants"}
    )
    heads: int = field(default=4, metadata={"doc": "query heads of a KV head that share a list, at most"})
    sinks: int = field(default=2, metadata={"doc": "first blocks, which every row reads"})
    window: int = field(default=4, metadata={"doc": "last blocks that a tile reads, its own included"})
    recent: int = field(default=2, metadata={"doc": "last blocks before a chunk, which all of it reads"})
    dense: int = field(default=2, metadata={"doc": "last tiles of the prompt that read everything"})
    block: int = field(default=128, metadata={"doc": f"tokens of a block and of a tile, a multiple of {BLOCK}"})
    chunk: int = field(default=1024, metadata={"doc": "tokens of a chunk, a multiple of the block"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"compactattention: alpha={self.alpha} is no share; give 0 to 1")
        least = {"heads": 1, "sinks": 0, "window": 1, "recent": 0, "dense": 0, "block": 1, "chunk": 1}
        for key, number in least.items():
            if getattr(self, key) < number:
                raise UserError(f"compactattention: {key}={getattr(self, key)} is too small; give {number} or more")
        for key, unit in (("block", BLOCK), ("chunk", self.block)):
            if getattr(self, key) % unit:
                raise UserError(f"compactattention: {key}={getattr(self, key)} is no multiple of {unit}; give one")


class CompactAttention(Planner):
    """The attention part. A first chunk has nothing before it and is dense."""

    name = "compactattention"
    seam = "attention"
    prompt_only = True
    Config = CompactConfig
    identity: ClassVar = {"alpha": 0.0}
    trial: ClassVar = {"alpha": 1.0, "sinks": 0, "window": 1, "recent": 0, "dense": 0, "block": 64, "chunk": 64}
    capability = Capability(prefix_stable=False, chunk_invariant=False, chunk=1024, digests=("mean_k",), looks=True)

    def __init__(self, config: CompactConfig) -> None:
        self.config = config
        self.capability = Capability(
            prefix_stable=False, chunk_invariant=False, chunk=config.chunk, digests=("mean_k",), looks=True
        )

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) for rows before which no block is whole, and where every block is wanted."""
        config = self.config
        if ctx.place is None:
            return None
        grid = Grid(ctx, config.block, config.block)
        steering = (ctx.prompt_len - 1) // config.block + 1 - config.dense  # from this tile on rows are dense
        if steering <= grid.first or (config.union and int(grid.begin[0]) < config.block):
            return None
        blocks = wanted(grid, grid.mean_keys(), config.alpha)
        readable = int(grid.causal.sum()) * len(blocks)
        if config.union:
            blocks[:, max(steering - grid.first, 0) :] = False
        plan = grid.plan(blocks | self._always(grid))
        if config.union:
            plan = coarsen(plan, sub_groups(ctx, config.heads), tiles=True)
            readable = grid.num_blocks * plan.num_lists
        assert plan.blk_idx is not None
        return None if len(plan.blk_idx) == readable else dense_rows(plan, steering * config.block)

    def _always(self, grid: Grid) -> Tensor:
        """bool [tiles, nb]: first and last blocks."""
        config, block = self.config, torch.arange(grid.num_blocks)
        own, chunk = grid.begin[:, None] // config.block, int(grid.begin[0]) // config.block
        always = (block < config.sinks) | (block > own - config.window)
        return always | (block >= chunk - config.recent) if config.union else always

    def operations(self, ctx: PlanContext) -> float:
        rows, heads, dim = ctx.q.shape
        return 2.0 * rows * heads * (dim + 8) * (int(ctx.tok[-1]) // self.config.block + 1)


def wanted(grid: Grid, means: Tensor, alpha: float) -> Tensor:
    """bool [Hq, tiles, nb]: blocks with at least `alpha` of the best one's mass, softmax of rows on mean keys.

    A row judges blocks that end at or before it. All rows of a tile are measured against their common maximum, not each
    against its own: rows that look at something in earnest count for more.
    """
    ctx, q_tile = grid.ctx, grid.q_tile
    slot = grid.tile * q_tile + ctx.tok % q_tile  # tiles with all their places, rows or not
    place = torch.full((grid.tiles * q_tile, 1), -1).index_copy_(0, slot, grid.place[:, None])
    known = int(grid.place[0] + 1) // grid.blk  # blocks that end before all rows
    unread = (torch.arange(known, grid.num_blocks) + 1) * grid.blk - 1 > place
    kept = []
    for rows, mean in zip(ctx.q.chunk(len(means), 1), means):
        scores = rows.float().flatten(0, 1) @ (mean * ctx.scale).T
        scores = scores.view(len(rows), -1, grid.num_blocks)
        if len(slot) < len(place):
            scores = torch.full((len(place), *scores.shape[1:]), -torch.inf).index_copy_(0, slot, scores)
        scores[:, :, known:].masked_fill_(unread[:, None], -torch.inf)
        scores = scores.view(grid.tiles, q_tile, rows.shape[1], -1)
        highest = scores.amax(1, keepdim=True).amax(3, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        mass = scores.sub_(highest).exp_().sum(1)
        kept.append(mass >= alpha * mass.amax(-1, keepdim=True))
    return torch.cat(kept, 1).transpose(0, 1)


def sub_groups(ctx: PlanContext, most: int) -> Tensor:
    """i64 [Hq]: the heads of each KV head in equal parts of at most `most`, or nearly equal ones."""
    group = ctx.q.shape[1] // ctx.num_kv_heads
    parts = -(-group // most)
    return (torch.arange(group) // -(-group // parts) + torch.arange(ctx.num_kv_heads)[:, None] * parts).flatten()
