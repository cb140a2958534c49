"""`flexprefill`: each head's pattern and budget are found in the prompt itself (FlexPrefill, arXiv 2502.20766).

The last rows of a pass are looked at exactly. Where what they read of each block is what mean keys foretell, means are
believed for all rows: the head is *query-aware*. Else it is *vertical-slash*: the key blocks and the distances that
the last rows look at are read by all. Either way as many as hold `gamma` of the attention (section 3, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.attention.grid import Grid
from firstlight.attention.probe import probe_operations, probed
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.ranking import best

COVERS = ("reference", "both")


@dataclass(frozen=True)
class FlexPrefillConfig:
    """Raises UserError on values that can't be."""

    gamma: float = field(default=0.9, metadata={"doc": "share of a head's attention that what is read should hold"})
    tau: float = field(
        default=0.1,
        metadata={
            "doc": "how far mean keys may be from the truth for a head to be query-aware, 0 to 0.83; 0 = none is"
        },
    )
    min_budget: int = field(default=512, metadata={"doc": "tokens that are read at least, of either kind of line"})
    max_budget: int | None = field(default=None, metadata={"doc": "tokens that are read at most of them; none: any"})
    block: int = field(default=128, metadata={"doc": "tokens of a block of rows or keys: 64, 128 or 256"})
    slash_cover: str = field(
        default="reference",
        metadata={
            "doc": "reference, as published: a band of distances opens the nearer of the two blocks that it crosses; "
            "both: both of them"
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not self.tau >= 0:
            raise UserError(f"flexprefill: give gamma in (0, 1] and tau from 0 up, not {self.gamma} and {self.tau}")
        if self.min_budget < 1 or (self.max_budget is not None and self.max_budget < self.min_budget):
            raise UserError(
                f"flexprefill: min_budget={self.min_budget} is no number of tokens up to "
                f"max_budget={self.max_budget}; give another"
            )
        if self.block not in (BLOCK, 2 * BLOCK, 4 * BLOCK):
            raise UserError(f"flexprefill: block={self.block} is no size of a block; give 64, 128 or 256")
        if self.slash_cover not in COVERS:
            raise UserError(f"flexprefill: slash_cover={self.slash_cover!r} is unknown; choose {' or '.join(COVERS)}")

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many."""
        return -(-tokens // self.block)


class FlexPrefill(Planner):
    """The attention part: a list of blocks for each query head and tile."""

    name = "flexprefill"
    seam = "attention"
    prompt_only = True
    Config = FlexPrefillConfig
    identity: ClassVar = {"gamma": 1.0}
    trial: ClassVar = {"gamma": 0.5, "min_budget": 64, "block": 64}
    capability = Capability(exact=False, prefix_stable=False, chunk_invariant=False, digests=("mean_k",), looks=True)

    def __init__(self, config: FlexPrefillConfig) -> None:
        self.config = config

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) where the least budgets hold everything."""
        c = self.config
        if ctx.place is None or (c.gamma >= 1 and c.max_budget is None):
            return None
        grid = Grid(ctx, c.block, c.block)
        if grid.num_blocks <= max(2, c.blocks(c.min_budget)):
            return None
        means = grid.mean_keys()
        last = ctx.q[-c.block :].float().mean(0).view(len(means), -1, means.shape[2])
        of_groups = [self._read(grid, *seen, *of) for seen, *of in zip(probed(ctx, c.block), last, means)]
        blocks, aware = (torch.cat(parts) for parts in zip(*of_groups))
        for head, chosen in by_means(grid, means, aware.nonzero()[:, 0].tolist(), c.gamma):
            blocks[head] |= chosen
        return grid.plan(blocks=blocks)

    def operations(self, ctx: PlanContext) -> float:
        """The probe, and all means by all others."""
        rows, heads, dim = ctx.q.shape
        pairs = (rows / self.config.block) * (int(ctx.tok[-1]) + 1) / self.config.block
        return probe_operations(ctx, self.config.block) + 2.0 * pairs * heads * dim

    def _read(
        self, grid: Grid, columns: Tensor, distances: Tensor, last: Tensor, means: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the last rows say for the query heads of a KV head: bool [G, tiles, nb], and bool [G], who is aware.

        Columns and distances f32 [G, n], last [G, D]: attention of the last rows, and their mean; means [nb, D].
        """
        c = self.config
        rows = min(c.block, len(grid.place))
        columns, distances = columns / rows, distances / rows
        of_blocks, of_bands = in_blocks(columns, c.block), in_blocks(distances, c.block)
        foretold = (last @ means.T * grid.ctx.scale).softmax(-1)
        aware = divergence(foretold, of_blocks) < c.tau
        keys, bands = (
            most(mass, torch.where(aware, c.blocks(c.min_budget), self._budget(each)))
            for mass, each in ((of_blocks, columns), (of_bands, distances))
        )
        return keys[:, None] | slashes(grid, bands, c.slash_cover == "both"), aware

    def _budget(self, mass: Tensor) -> Tensor:
        """i64 [G]: of how many blocks the best columns or distances (mass f32 [G, n]) would be whole ones."""
        c = self.config
        blocks = needed(mass, c.gamma) // c.block + 1
        return blocks.clamp(c.blocks(c.min_budget), None if c.max_budget is None else c.blocks(c.max_budget))


def in_blocks(x: Tensor, blk: int) -> Tensor:
    """f32 [G, nb]: sums over blocks of [G, n], the last one partial."""
    return pad(x, (0, -x.shape[1] % blk)).view(x.shape[0], -1, blk).sum(2)


def needed(mass: Tensor, gamma: float) -> Tensor:
    """i64 [G]: how many of f32 [G, n], the largest first, are more than gamma together."""
    running = np.sort(mass.numpy())[:, ::-1].cumsum(1, dtype=np.float64)
    return torch.from_numpy((running <= gamma).sum(1) + 1).clamp(max=mass.shape[1])


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """[G]: the square root of the Jensen-Shannon divergence of f32 [G, n], 0 to sqrt(ln 2); 0 log 0 is 0."""
    middle = (a + b) / 2
    apart = torch.xlogy(a, a) + torch.xlogy(b, b) - 2 * torch.xlogy(middle, middle)
    return (apart.sum(-1) / 2).clamp(min=0).sqrt()


def most(mass: Tensor, count: Tensor) -> Tensor:
    """bool [G, nb]: the count[g] best of each row, the first one always among them (it takes a place)."""
    mass = mass.clone()
    mass[:, 0] = torch.inf
    return best(mass, count)


def slashes(grid: Grid, bands: Tensor, both: bool) -> Tensor:
    """bool [G, tiles, nb]: bands bool [G, nb] of distances, band m opens the block m before a tile's own.

    Distances from m blk on reach over that block's beginning into the one before, for all but one row of a tile: `both`
    opens that one too.
    """
    first, last = grid.begin // grid.blk, (grid.end - 1) // grid.blk  # the same, but where tokens were dropped
    block = torch.arange(grid.num_blocks)
    opened = torch.zeros(len(bands), grid.tiles, grid.num_blocks, dtype=torch.bool)
    for own in (first, last, *([first - 1] if both else [])):
        apart = own[:, None] - block
        opened |= bands[:, apart.clamp(min=0)] & (apart >= 0)
    return opened


def by_means(grid: Grid, means: Tensor, heads: Sequence[int], gamma: float) -> Iterator[tuple[int, Tensor]]:
    """(head, bool [tiles, nb]): the best of all (tile, block) pairs of a head, together `gamma` of what all tiles read.

    Means f32 [Hkv, nb, D]. One budget for all: a tile that looks at one place needs few blocks.
    """
    group = grid.ctx.q.shape[1] // len(means)
    for head, rows in zip(heads, grid.pooled(grid.ctx.q[:, heads]).unbind(1)):
        scores = (rows @ means[head // group].T * grid.ctx.scale).masked_fill(~grid.causal, -torch.inf)
        weight = scores.softmax(-1).nan_to_num(0.0).flatten()  # an empty tile has none
        order = weight.argsort(descending=True, stable=True)
        enough = weight[order].double().cumsum(0) <= gamma * int((grid.rows > 0).sum())
        chosen = torch.zeros(len(weight), dtype=torch.bool)
        chosen[order[enough]] = True
        yield head, chosen.view(scores.shape)
