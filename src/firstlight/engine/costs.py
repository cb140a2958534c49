"""The cost guard: a plan is used only where planning it and reading less take less time than dense attention.

What a key costs is measured once, when an engine with a planner that looks at keys is built: read densely, in listed
blocks, as a single column; and what an operation of planning costs. `--deterministic` runs do without, since then
nothing may depend on a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from firstlight.attention.grid import Grid, pairs
from firstlight.attention.probe import probe_operations, probed
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK, KVLayout
from firstlight.models.config import ModelConfig

_ENTRIES, _ROWS, _Q_TILE = 2048, 256, 128
_BLOCK_SHARE, _COLUMN_SHARE = 0.3, 0.05
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds for one (row, key, query head), and for one operation of planning."""

    dense: float
    block: float
    column: float
    operation: float

    def densely(self, ctx: PlanContext) -> float:
        """Of attention without a plan."""
        return self.dense * float((ctx.tok + 1).sum()) * ctx.q.shape[1]

    def of(self, plan: AttnPlan, ctx: PlanContext) -> float:
        """Of attention under a plan, predicted."""
        near, far, rows = pairs(plan, ctx.tok)
        return float(rows @ (self.block * near + self.column * far).sum(1))


def measure(
    ops: ModuleType, config: ModelConfig, planner: Planner, dtype: torch.dtype, layout: type[KVLayout] = KVLayout
) -> Costs:
    """On some keys of the model's shape, with torch's present threads."""
    ctx, call = _sample(config, dtype, layout)
    grid, generator = Grid(ctx, _Q_TILE, BLOCK), torch.Generator().manual_seed(0)
    heads, tiles, blocks = config.num_heads, grid.tiles, grid.num_blocks
    some = torch.rand(heads, tiles, blocks, generator=generator) < _BLOCK_SHARE
    few = torch.rand(heads, tiles, _ENTRIES, generator=generator) < _COLUMN_SHARE
    pairs = float((ctx.tok + 1).sum()) * heads

    def attend(plan: AttnPlan | None) -> Callable[[], object]:
        return lambda: ops.attend(replace(call, plan=plan), 0, _ROWS)

    operations, plan_something = _operations(planner, ctx)
    dense, block, column, operation = _shortest(
        attend(None), attend(grid.plan(blocks=some)), attend(grid.plan(columns=few)), plan_something
    )
    return Costs(
        dense=dense / pairs,
        block=block / (float((some & grid.causal).sum()) * BLOCK * _Q_TILE),
        column=column / (float(few.sum()) * _Q_TILE),
        operation=operation / operations,
    )


def _operations(planner: Planner, ctx: PlanContext) -> tuple[float, Callable[[], object]]:
    """How many, and what makes them: the planner's own rehearsal, else a probe."""
    if count := planner.rehearse(ctx):
        return count, lambda: planner.rehearse(ctx)
    return probe_operations(ctx, BLOCK), lambda: list(probed(ctx, BLOCK))


def _sample(config: ModelConfig, dtype: torch.dtype, kind: type[KVLayout]) -> tuple[PlanContext, AttnCall]:
    """The last rows of a prompt, and its attention call."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(_ENTRIES, kv_heads, dim, generator=generator).to(dtype)
    q = torch.randn(_ROWS, heads, dim, generator=generator).to(dtype)
    table, layout = kind.holding(k, k)
    tok = torch.arange(_ENTRIES - _ROWS, _ENTRIES)
    rows = AttnRows([0, _ROWS], tok, tok, [False])
    call = AttnCall(q, rows, layout, [KVView(table, [_ENTRIES] * kv_heads)], torch.empty_like(q), dim**-0.5)
    keys = k.transpose(0, 1)
    ctx = PlanContext(0, q, tok, tok, kv_heads, _ENTRIES, True, lambda: keys, {}, tok, dim**-0.5)
    return ctx, call


def _shortest(*calls: Callable[[], object]) -> list[float]:
    """Seconds of each. They take turns, so that what disturbs the machine for a while disturbs all of them;
    each twice, since the one before has left the caches to itself.
    """
    best = [float("inf")] * len(calls)
    for _ in range(_ROUNDS):
        for i, call in enumerate(calls):
            for _ in range(2):
                began = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - began)
    return best
