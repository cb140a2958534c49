"""`quoka`: which tokens a chunk reads, against its formulas in plain loops and on planted rows and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.quoka import Quoka, QuokaConfig
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.core.errors import UserError
from tests.unit.test_compactattention import D, context


def planned(ctx: PlanContext, **config: Any) -> AttnPlan | None:
    return Quoka(QuokaConfig(**config)).plan(ctx)


def read(plan: AttnPlan | None, kv_head: int) -> tuple[list[int], list[int]]:
    """(blocks, single entries) of a KV head."""
    assert plan is not None and plan.blk_ptr is not None and plan.blk_idx is not None
    assert plan.col_ptr is not None and plan.col_idx is not None
    assert not plan.tile_map.any() and not plan.band.any()
    ends = (slice(int(ptr[kv_head]), int(ptr[kv_head + 1])) for ptr in (plan.blk_ptr, plan.col_ptr))
    return plan.blk_idx[next(ends)].tolist(), plan.col_idx[next(ends)].tolist()


def cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def by_hand(ctx: PlanContext, queries: int, before: int) -> list[list[float]]:
    """[Hkv][before] scores by the letter of the card."""
    n, heads, _ = ctx.q.shape
    group = heads // ctx.num_kv_heads
    found = []
    for kv, keys in enumerate(ctx.keys()):
        ranked = []
        for h in range(kv * group, (kv + 1) * group):
            rows = ctx.q[:, h]
            order = sorted(range(n), key=lambda t, rows=rows: cosine(rows[t], rows.mean(0)))[:queries]
            ranked.append([rows[t] / rows[t].norm() for t in (order if n > queries else range(n))])
        judges = [sum(rows) / group for rows in zip(*ranked)]
        found.append([max(float(j @ k) / float(k.norm()) for j in judges) for k in keys[:before]])
    return found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), begin=st.integers(64, 330), n=st.integers(2, 40), pool=st.sampled_from([1, 64]))
def test_against_the_formulas(seed: int, begin: int, n: int, pool: int) -> None:
    """Three heads a KV head; chunks that begin anywhere; more judges than rows."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, begin + n, D, generator=generator)
    ctx = context(torch.randn(n, 6, D, generator=generator), keys, begin)
    budget, before = 70 if pool == 64 else 19, begin // 64 * 64
    plan = planned(ctx, budget=budget, pool=pool, queries=9, sink=3)
    if before <= budget:
        assert plan is None
        return
    chunk = list(range(before // 64, (begin + n - 1) // 64 + 1))
    for kv, scores in enumerate(by_hand(ctx, 9, before)):
        if pool == 1:
            best = sorted(sorted(range(before), key=lambda j, s=scores: -s[j])[:budget])
            assert read(plan, kv) == (chunk, sorted({0, 1, 2, *best}))
        else:
            sums = [sum(scores[b * 64 : b * 64 + 64]) for b in range(before // 64)]
            best = max(range(len(sums)), key=sums.__getitem__)
            assert read(plan, kv) == ([best, *chunk], [] if best == 0 else [0, 1, 2])
    assert plan is not None and plan.head_map.tolist() == [0, 0, 0, 1, 1, 1]


def test_unusual_rows_find_their_token_and_usual_ones_do_not() -> None:
    q, keys = torch.zeros(32, 1, D), torch.zeros(1, 160, D)
    q[:, 0, 0] = 1.0
    keys[:, :, 1] = 1.0
    keys[0, 40, 1:3] = torch.tensor([0.0, 1e-3])  # angle counts, not size
    keys[0, 50, 1:4] = torch.tensor([0.0, 0.0, 5.0])
    q[7, 0, 2], q[7, 0, 0] = 1.0, 0.0
    q[9, 0, 3] = 1.0  # less unusual: the second to be asked
    assert read(planned(context(q, keys, 128), budget=1, queries=1), 0) == ([2], [40])
    assert read(planned(context(q, keys, 128), budget=2, queries=1), 0)[1] == [0, 40]
    assert read(planned(context(q, keys, 128), budget=2, queries=2), 0)[1] == [40, 50]


def test_selection_follows_angles_and_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    q, keys = torch.randn(20, 4, D, generator=generator), torch.randn(2, 212, D, generator=generator)
    plan = planned(context(q, keys, 192), budget=30)
    assert read(planned(context(q, 7 * keys, 192), budget=30), 1) == read(plan, 1)
    order = torch.randperm(192, generator=generator)
    mixed = keys.clone()
    mixed[:, :192] = keys[:, order]
    moved = read(planned(context(q, mixed, 192), budget=30), 0)[1]
    assert sorted(order[moved].tolist()) == read(plan, 0)[1]


def test_nothing_to_tell_apart_takes_the_first() -> None:
    """Rows and keys of zeros have no angle: no NaN, and of equal tokens the first."""
    ctx = context(torch.zeros(20, 2, D), torch.zeros(1, 212, D), 192)
    assert read(planned(ctx, budget=5), 0) == ([3], [0, 1, 2, 3, 4])


def test_what_is_dense() -> None:
    q, keys = torch.randn(20, 2, D), torch.randn(1, 212, D)
    assert planned(context(q, keys, 192), budget=192) is None
    assert planned(context(q, keys, 192), budget=191) is not None
    assert planned(context(q[:1], keys, 192), budget=5) is None
    assert planned(context(q, keys, 0), budget=5) is None  # a first chunk
    few, many = (set(read(planned(context(q, keys, 192), budget=n), 0)[1]) for n in (10, 60))
    assert few < many and len(many) == 60


@pytest.mark.parametrize("bad", [{"budget": 0}, {"queries": 0}, {"pool": 32}, {"sink": -1}])
def test_bad_settings_are_told(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        QuokaConfig(**bad)
