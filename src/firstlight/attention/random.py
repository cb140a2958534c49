"""`random`: each row reads the first tokens, the last ones before it, and blocks between that dice choose. A control.

A planner that looks at keys must beat it at the same density. The dice know the seed, layer, head, tile and block and
nothing else: so what a row reads is the same in every chunk and every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from firstlight.attention.grid import Grid
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability

BLOCKS = (16, 32, 64, 128, 256)
_FORCED = 2
"""Blocks' worth of tokens that every row reads."""
_ROUNDING = torch.tensor([-1])
"""No block's number."""


@dataclass(frozen=True)
class RandomConfig:
    """Raises UserError on values that can't be."""

    density: float = field(
        default=0.3, metadata={"doc": "share of the tokens before a row that it reads, chosen or not; 1 = all"}
    )
    block: int = field(
        default=128, metadata={"doc": f"tokens of a block, and of the first and the last, one of {BLOCKS}"}
    )
    seed: int = field(default=0, metadata={"doc": "other dice"})

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise UserError(f"random: density={self.density} is no share; give 0 to 1")
        if self.block not in BLOCKS:
            raise UserError(f"random: block={self.block} can't be; choose one of {', '.join(map(str, BLOCKS))}")


class Random(Planner):
    """The attention part: for each query head and tile of rows a list of blocks, and a band for all."""

    name = "random"
    seam = "attention"
    prompt_only = True
    Config = RandomConfig
    identity: ClassVar = {"density": 1.0}
    trial: ClassVar = {"density": 0.4, "block": 16}
    capability = Capability(exact=False, prefix_stable=True, chunk_invariant=True)

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) where first and last blocks hold the whole prompt."""
        c = self.config
        if ctx.place is None or c.density == 1 or ctx.prompt_len <= _FORCED * c.block:
            return None
        grid = Grid(ctx, c.block, c.block)
        tile, block = torch.arange(grid.first, grid.first + grid.tiles), torch.arange(grid.first + grid.tiles)
        head = torch.arange(ctx.q.shape[1])[:, None, None]
        between = (block > 0) & (block < tile[:, None])
        dice = _dice(c.seed, ctx.layer, head, tile[:, None], block)
        rank = dice.masked_fill(~between, 2.0).argsort(-1).argsort(-1)
        # The mean row of tile i sees i + 1/2 blocks in all. A share of a block is rounded by dice, so that it is met.
        share = c.density * (tile[:, None] + 0.5) - _FORCED
        count = (share + _dice(c.seed, ctx.layer, head, tile[:, None], _ROUNDING)).floor()
        chosen = between & (rank < count)
        chosen = torch.nn.functional.pad(chosen, (0, max(grid.num_blocks - chosen.shape[2], 0)))
        return grid.plan(blocks=chosen[..., : grid.num_blocks], band=(c.block, c.block))


def _dice(seed: int, *coordinates: int | Tensor) -> Tensor:
    """f64 in [0, 1), one for each combination: SplitMix64's mixing (Steele et al., 2014), coordinate by coordinate."""
    state = torch.tensor(seed)
    for coordinate in coordinates:
        state = state * 31 + coordinate + 0x1E3779B97F4A7C15
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            state = (state ^ _shifted(state, shift)) * factor
        state = state ^ _shifted(state, 31)
    return _shifted(state, 11).double() / 2**53


def _shifted(x: Tensor, count: int) -> Tensor:
    """i64 shifted right, zeros coming in."""
    return (x >> count) & ((1 << (64 - count)) - 1)
