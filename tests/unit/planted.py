"""Queries and keys for planners to look at, and what their plans then show: for tests without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firstlight.core.attn import DENSE, AttnPlan, PlanContext
from firstlight.kernels.kv_layout import BLOCK

GROUP, KV_HEADS, DIM = 3, 2, 16
HEADS = GROUP * KV_HEADS


def context(
    q: Tensor, keys: Tensor, tok: Sequence[int] | Tensor, place: Tensor | None = None, prompt_len: int = 1 << 20
) -> PlanContext:
    """Of rows q [n, Hq, D] with ordinals `tok`, over keys [Hkv, N, D]; `place`: their own entries, if others."""
    tok = torch.as_tensor(tok)

    def mean_k(name: str) -> Tensor:
        assert name == "mean_k"
        return torch.stack([block.mean(1) for block in keys.split(BLOCK, 1)], 1)

    place = tok if place is None else place
    values = (keys, keys)
    return PlanContext(
        0, q, tok, tok, KV_HEADS, prompt_len, True, lambda: keys, {}, place, DIM**-0.5, mean_k, lambda: values
    )


def some(seed: int, lo: int, hi: int, strength: float = 2.0) -> PlanContext:
    """Random rows [lo, hi) over hi keys, some of which attract or repel."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(KV_HEADS, hi, DIM, generator=generator)
    keys[:, ::17] *= strength
    q = torch.randn(hi - lo, HEADS, DIM, generator=generator) * strength
    return context(q, keys, torch.arange(lo, hi))


def planted(column: int | None = None, distance: int | None = None, n: int = 640) -> PlanContext:
    """All rows look at one key, or each at the one so far before it; a code for every place makes them tell it."""
    places = torch.nn.functional.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(1)), dim=1)
    at = torch.full((n,), column) if column is not None else (torch.arange(n) - (distance or 0)).clamp(min=0)
    return context((places[at] * 400)[:, None].expand(-1, HEADS, -1), places.expand(KV_HEADS, -1, -1), torch.arange(n))


def seen(plan: AttnPlan | None, ctx: PlanContext) -> Tensor:
    """bool [n, Hq, N]: what each row of each head reads, as `core/attn.py` defines it; positions are ordinals here."""
    assert ctx.place is not None
    entry = torch.arange(int(ctx.place[-1]) + 1)
    causal = entry <= ctx.place[:, None]
    if plan is None:
        return causal[:, None].expand(-1, ctx.q.shape[1], -1)
    see, tiles = torch.zeros(len(ctx.tok), ctx.q.shape[1], len(entry), dtype=torch.bool), ctx.tok // plan.q_tile
    for tile in tiles.unique().tolist():
        rows = tiles == tile
        first = int(plan.tile_map[tile - int(plan.tile_first)]) * plan.num_lists
        lists = [_list(plan, first + which, entry, ctx.place[rows, None]) for which in range(plan.num_lists)]
        see[rows] = torch.stack(lists, 1)[:, plan.head_map.long()]
    return see & causal[:, None]


def _list(plan: AttnPlan, row: int, entry: Tensor, own: Tensor) -> Tensor:
    """bool [rows, N]: what one list shows to rows whose own entries are `own` [rows, 1]."""
    sink, window = plan.band[row].tolist()
    if window == DENSE:
        return torch.ones(len(own), len(entry), dtype=torch.bool)
    see = (entry < sink) | (own - entry < window)
    for ptr, idx, size in ((plan.blk_ptr, plan.blk_idx, plan.blk), (plan.col_ptr, plan.col_idx, 1)):
        if ptr is not None and idx is not None:
            named = idx[int(ptr[row]) : int(ptr[row + 1])]
            assert bool((named[1:] > named[:-1]).all()), "ascending, each once"
            see = see | torch.isin(entry // size, named)
    return see


def density(plan: AttnPlan | None, ctx: PlanContext) -> float:
    """Share of what dense would read."""
    return float(seen(plan, ctx).sum() / seen(None, ctx).sum())
