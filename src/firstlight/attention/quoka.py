"""`quoka`: a chunk reads its own tokens and the best tokens before it, as its most unusual rows judge (QUOKA, arXiv
2602.08722).

Rows that point away from the chunk's mean row decide what the chunk can attend to; few of them stand for all. They and
the keys are compared by angle alone, and every row of the chunk reads the same tokens. `pool=64` takes whole blocks by
their sums instead of tokens: cheaper to read, coarser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from firstlight.attention.grid import csr
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.ranking import best

Q_TILE = 128
"""Rows of a plan tile: a multiple of every kernel's own tile."""


@dataclass(frozen=True)
class QuokaConfig:
    """Counts of tokens. Raises UserError on values that mean nothing."""

    budget: int = field(default=1024, metadata={"doc": "tokens before a chunk that each KV head reads"})
    queries: int = field(default=16, metadata={"doc": "rows of a chunk that judge, for each head its own"})
    pool: int = field(default=1, metadata={"doc": f"tokens that are chosen together: 1, or {BLOCK} for whole blocks"})
    sink: int = field(default=0, metadata={"doc": "first tokens that every row reads besides"})
    chunk: int = field(default=1024, metadata={"doc": "tokens of a chunk"})

    def __post_init__(self) -> None:
        for key, least in (("budget", 1), ("queries", 1), ("sink", 0), ("chunk", 2)):
            if getattr(self, key) < least:
                raise UserError(f"quoka: {key}={getattr(self, key)} is too small; give {least} or more")
        if self.pool not in (1, BLOCK):
            raise UserError(f"quoka: pool={self.pool} is not possible; give 1 or {BLOCK}")


class Quoka(Planner):
    """The attention part: one slot, a list for each KV head. A first chunk has nothing before it and is dense."""

    name = "quoka"
    seam = "attention"
    prompt_only = True
    Config = QuokaConfig
    identity: ClassVar = {"budget": 1 << 20}
    trial: ClassVar = {"budget": 16, "queries": 4, "sink": 2, "chunk": 64}
    capability = Capability(prefix_stable=False, chunk_invariant=False, chunk=1024, digests=("unit_k",), looks=True)

    def __init__(self, config: QuokaConfig) -> None:
        self.config = config
        self.capability = Capability(
            prefix_stable=False, chunk_invariant=False, chunk=config.chunk, digests=("unit_k",), looks=True
        )

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) for single rows, and where the budget holds all whole blocks before the chunk.

        The block that the chunk begins in counts as the chunk's: all its tokens are read.
        """
        config = self.config
        if ctx.place is None or len(ctx.tok) < 2:
            return None
        before, entries = int(ctx.place[0]) // BLOCK * BLOCK, int(ctx.place[-1]) + 1
        if before <= config.budget:
            return None
        scores = token_scores(ctx, judges(ctx, config.queries), before)
        count = max(config.budget // config.pool, 1)
        chosen = best(scores.view(len(scores), -1, config.pool).sum(-1), count)
        chunk = torch.arange(-(-entries // BLOCK)) >= before // BLOCK
        blocks, columns = chunk.repeat(len(scores), 1), torch.arange(before).expand(len(scores), -1) < config.sink
        if config.pool == 1:
            columns = columns | chosen
        else:
            blocks[:, : chosen.shape[1]] |= chosen
            columns = columns & ~chosen.repeat_interleave(BLOCK, 1)
        return _shared(ctx, blocks, columns)

    def operations(self, ctx: PlanContext) -> float:
        rows, heads, dim = ctx.q.shape
        past = int(ctx.tok[0]) * ctx.num_kv_heads
        return 2.0 * dim * (2 * rows * heads + past * (min(self.config.queries, rows) + 8))


def judges(ctx: PlanContext, count: int) -> Tensor:
    """f32 [Hkv, m, D]: of each head the `count` rows at the widest angle to its mean row, widest first, at length one;
    then the mean over the heads of a KV head, rank by rank. All rows in their order where there are no more."""
    rows = ctx.q.float().transpose(0, 1)  # [Hq, n, D]
    length = rows.norm(dim=-1).clamp_min(1e-30)
    if count < rows.shape[1]:
        near = torch.bmm(rows, rows.mean(1)[:, :, None])[:, :, 0] / length  # cosines times what a head's rows share
        order = near.argsort(dim=1, stable=True)[:, :count]
        rows, length = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2])), length.gather(1, order)
    unit: Tensor = rows / length[:, :, None]
    return unit.reshape(ctx.num_kv_heads, -1, *unit.shape[1:]).mean(1)


def token_scores(ctx: PlanContext, judging: Tensor, count: int) -> Tensor:
    """f32 [Hkv, count]: of each of the first entries the highest cosine that a judge gives it."""
    assert ctx.digest is not None
    products, room = torch.empty(len(judging), count), torch.empty(judging.shape[1], count)
    for head, rows in enumerate(judging):
        ctx.by_keys(head, rows, room)
        torch.amax(room, 0, out=products[head])
    return products.mul_(ctx.digest("unit_k").flatten(1)[:, :count])  # lengths aren't negative


def _shared(ctx: PlanContext, blocks: Tensor, columns: Tensor) -> AttnPlan:
    """One slot for all tiles: bool [Hkv, nb] and [Hkv, n]."""
    first = int(ctx.tok[0]) // Q_TILE
    tiles = int(ctx.tok[-1]) // Q_TILE - first + 1
    blk_ptr, blk_idx = csr(blocks)
    col_ptr, col_idx = csr(columns)
    return AttnPlan(
        q_tile=Q_TILE,
        blk=BLOCK,
        head_map=torch.arange(ctx.num_kv_heads).repeat_interleave(ctx.q.shape[1] // ctx.num_kv_heads).to(torch.int16),
        tile_base=torch.tensor([0, tiles], dtype=torch.int32),
        tile_first=torch.tensor([first], dtype=torch.int32),
        tile_map=torch.zeros(tiles, dtype=torch.int32),
        band=torch.zeros(len(blocks), 2, dtype=torch.int32),
        blk_ptr=blk_ptr,
        blk_idx=blk_idx,
        col_ptr=col_ptr,
        col_idx=col_idx,
    )
