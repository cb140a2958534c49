"""The attention kernel's time over density: does a plan that reads a tenth take a tenth of dense attention's time?

    python benchmarks/density.py smollm2 --tokens 8192 --threads 1

One prompt's attention in one layer, on random Q, K and V in the model's shape. Each kind of entry is asked for at each
density: blocks by dice beside every row's own (`blocks 128` as `xattention`, `blocks 64` as `minference`), single
columns by dice, and a window. What counts is the density that the kernel itself reports. All calls take turns, and the
least time of each stands: `over` is time / (density x dense's time), of which the target is 1.25 down to 5 %. On one
thread it is the process's own time: a long call has to wait for other programs more often than a short one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from firstlight.attention.grid import Grid
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.kernels.contract import AttnCall, AttnRows, AttnStats, KVView
from firstlight.kernels.dispatch import fastest
from firstlight.kernels.kv_layout import Int8Layout, KVLayout
from firstlight.kernels.threads import bound
from firstlight.models.config import ModelConfig
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve

DENSE = "dense"


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    config = open_checkpoint(resolve(args.model)).config
    with torch.inference_mode(), bound():  # as the engine runs
        rows = measure(config, args)
    print(f"{'entries':12} {'asked':>6} {'density':>8} {'ms':>9} {'of dense':>9} {'over':>6}")
    for row in rows:
        figures = f"{row['asked']:6.2f} {row['density']:8.3f} {1e3 * row['seconds']:9.1f} {row['of_dense']:9.3f}"
        print(f"{row['entries']:12} {figures} {row['over']:6.2f}")
    print(json.dumps({"arguments": vars(args), "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--densities", default="0.5,0.3,0.2,0.1,0.05")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--int8", action="store_true", help="K and V in 8 bits")
    return parser.parse_args()


def measure(config: ModelConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for dense and for each kind of entry at each density."""
    ctx, call = _prompt(config, args.tokens, Int8Layout if args.int8 else KVLayout)
    asked: list[tuple[str, float, AttnPlan | None]] = [(DENSE, 1.0, None)]
    asked += [
        (kind, density, plan)
        for density in map(float, args.densities.split(","))
        for kind, plan in plans(ctx, density).items()
    ]
    calls = [replace(call, plan=plan, stats=AttnStats()) for _, _, plan in asked]
    clock = time.process_time if args.threads == 1 else time.perf_counter
    ops, best = fastest(config.head_dim), [float("inf")] * len(calls)
    for _ in range(args.rounds):
        for i, each in enumerate(calls):
            began = clock()
            ops.attend(each, 0, args.tokens)
            best[i] = min(best[i], clock() - began)
    return list(_rows(asked, calls, best))


def _rows(asked: list[Any], calls: list[AttnCall], best: list[float]) -> Iterator[dict[str, Any]]:
    for (kind, share, _), call, seconds in zip(asked, calls, best, strict=True):
        density, of_dense = call.stats.visible / call.stats.dense, seconds / best[0]
        figures = {"density": density, "seconds": seconds, "of_dense": of_dense, "over": of_dense / density}
        yield {"entries": kind, "asked": share, **figures}


def plans(ctx: PlanContext, density: float) -> dict[str, AttnPlan]:
    """One plan for each kind of entry, every head with dice of its own."""
    window = round(len(ctx.tok) * (1 - (1 - density) ** 0.5))
    dice, heads = torch.Generator().manual_seed(0), ctx.q.shape[1]
    found = {f"blocks {size}": _blocks(Grid(ctx, size, size), heads, density, dice) for size in (128, 64)}
    grid = Grid(ctx, 64, 64)
    found["columns"] = grid.plan(columns=torch.rand(heads, 1, grid.num_entries, generator=dice) < density)
    found["window"] = grid.plan(band=(64, window))
    return found


def _blocks(grid: Grid, heads: int, density: float, dice: torch.Generator) -> AttnPlan:
    """Every tile's own block, and of those before it what is missing to `density` of all."""
    own, before = float(grid.diagonal.sum()) / 2, grid.causal & ~grid.diagonal
    share = max(density * (own + float(before.sum())) - own, 0.0) / float(before.sum())
    chosen: Tensor = torch.rand(heads, *before.shape, generator=dice) < share
    return grid.plan(blocks=chosen & before | grid.diagonal)


def _prompt(c: ModelConfig, tokens: int, kind: type[KVLayout]) -> tuple[PlanContext, AttnCall]:
    """All rows of a prompt: what a planner sees, and the call."""
    q = torch.randn(tokens, c.num_heads, c.head_dim).bfloat16()
    k, v = (torch.randn(tokens, c.num_kv_heads, c.head_dim).bfloat16() for _ in range(2))
    tok, keys, scale = torch.arange(tokens), k.transpose(0, 1), c.head_dim**-0.5
    table, layout = kind.holding(k, v)
    view = KVView(table, [tokens] * c.num_kv_heads)
    call = AttnCall(q, AttnRows([0, tokens], tok, tok, [False]), layout, [view], torch.empty_like(q), scale)
    return PlanContext(0, q, tok, tok, c.num_kv_heads, tokens, True, lambda: keys, {}, tok, scale), call


if __name__ == "__main__":
    main()
