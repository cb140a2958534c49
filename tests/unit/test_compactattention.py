"""`compactattention`: which blocks a chunk reads, against its formulas in plain loops and on planted keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.compactattention import CompactAttention, CompactConfig, sub_groups
from firstlight.cache.digests import DIGESTS
from firstlight.core.attn import DENSE, AttnPlan, PlanContext
from firstlight.core.errors import UserError
from firstlight.kernels.kv_layout import BLOCK

D = 16
SMALL = {"block": 64, "chunk": 256, "sinks": 1, "window": 1, "recent": 1, "dense": 0}


def mean_k(keys: Tensor) -> Callable[[str], Tensor]:
    """Of [Hkv, n, D], as the cache gives it."""

    def read(name: str) -> Tensor:
        blocks = [torch.nn.functional.pad(part, (0, 0, 0, BLOCK - part.shape[1])) for part in keys.split(BLOCK, 1)]
        count = [part.shape[1] for part in keys.split(BLOCK, 1)]
        return torch.stack([DIGESTS[name](b, torch.full((len(b),), c)) for b, c in zip(blocks, count)], 1)

    return read


def context(q: Tensor, keys: Tensor, begin: int, prompt_len: int = 10**6, tok: Tensor | None = None) -> PlanContext:
    """Rows q [n, Hq, D] whose own entries are those from `begin` on, keys [Hkv, n_kv, D]."""
    place = torch.arange(begin, begin + len(q))
    tok = place if tok is None else tok
    return PlanContext(0, q, tok, tok, len(keys), prompt_len, False, lambda: keys, {}, place, D**-0.5, mean_k(keys))


def planned(ctx: PlanContext, **config: Any) -> AttnPlan | None:
    return CompactAttention(CompactConfig(**{**SMALL, **config})).plan(ctx)


def listed(plan: AttnPlan | None, head: int, tile: int) -> list[int]:
    assert plan is not None and plan.blk_ptr is not None and plan.blk_idx is not None
    row = int(plan.tile_map[tile]) * plan.num_lists + int(plan.head_map[head])
    return plan.blk_idx[int(plan.blk_ptr[row]) : int(plan.blk_ptr[row + 1])].tolist()


def by_hand(ctx: PlanContext, c: CompactConfig) -> dict[tuple[int, int], set[int]]:
    """(head, tile) -> blocks that it wants, by the letter of the card: masses from block maxima, then rescaled."""
    keys, group = ctx.keys(), ctx.q.shape[1] // ctx.num_kv_heads
    tok, place = ctx.tok.tolist(), (ctx.place if ctx.place is not None else ctx.tok).tolist()
    out: dict[tuple[int, int], set[int]] = {}
    for h in range(ctx.q.shape[1]):
        for tile in sorted({t // c.block for t in tok}):
            rows = [i for i, t in enumerate(tok) if t // c.block == tile]
            last = place[rows[-1]]
            mass, top = {}, {}
            for b in range(last // c.block + 1):
                mean = keys[h // group, b * c.block : (b + 1) * c.block].mean(0)
                able = [i for i in rows if place[i] >= (b + 1) * c.block - 1]
                scores = [float(ctx.q[i, h] @ mean) * ctx.scale for i in able]
                if scores:
                    top[b] = max(scores)
                    mass[b] = sum(math.exp(s - top[b]) for s in scores)
            share = {b: mass[b] * math.exp(top[b] - max(top.values())) for b in mass}
            want = {b for b in share if share[b] >= c.alpha * max(share.values())}
            own = place[rows[0]] // c.block
            near = {b for b in range(last // c.block + 1) if b < c.sinks or b > own - c.window}
            out[h, tile - tok[0] // c.block] = want | near
    return out


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), begin=st.integers(64, 700), n=st.integers(1, 200), alpha=st.floats(0.3, 0.95))
def test_against_the_formulas(seed: int, begin: int, n: int, alpha: float) -> None:
    """Ragged chunks that begin inside a tile, three heads a KV head; alone and united."""
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(n, 6, D, generator=generator)
    ctx = context(q, torch.randn(2, begin + n, D, generator=generator), begin)
    config = CompactConfig(**{**SMALL, "alpha": alpha})
    want = by_hand(ctx, config)
    tiles = (begin + n - 1) // 64 - begin // 64 + 1
    alone, united = planned(ctx, alpha=alpha, union=False), planned(ctx, alpha=alpha)
    for (h, t), blocks in want.items():
        if alone is not None:
            assert set(listed(alone, h, t)) == blocks
        else:
            assert blocks == {b for b in range(begin // 64 + t + 1) if b * 64 < begin + n}
    whole = set(range((begin + n - 1) // 64 + 1))
    for h in range(6):
        kv = range(h // 3 * 3, h // 3 * 3 + 3)
        blocks = set.union(*(want[other, t] for other in kv for t in range(tiles)))
        blocks |= {b for b in whole if b >= begin // 64 - 1}
        assert blocks == (whole if united is None else set(listed(united, h, 0)))


def test_a_needle_is_found_and_shared() -> None:
    """One row of one head looks at block 2; its KV group's heads read it too, those of the other don't."""
    q, keys = torch.zeros(128, 6, D), torch.zeros(2, 640 + 128, D)
    keys[:, 128:192, 0] = 8.0
    q[:, :, 1] = keys[:, 0:64, 1] = 4.0  # all else looks at the sink
    q[77, 1] = 0.0
    q[77, 1, 0] = 4.0
    plan = planned(context(q, keys, 640), alpha=0.5)
    assert plan is not None and int(plan.head_map.max()) == 1 and plan.tile_map.tolist() == [0, 0]
    assert listed(plan, 0, 0) == listed(plan, 2, 1) == [0, 2, 9, 10, 11]
    assert listed(plan, 3, 0) == [0, 9, 10, 11]
    alone = planned(context(q, keys, 640), alpha=0.5, union=False)
    assert [listed(alone, 1, tile) for tile in (0, 1)] == [[0, 10], [0, 2, 11]]
    assert listed(alone, 0, 1) == [0, 11]


def test_tiles_that_want_different_blocks_saturate() -> None:
    q, keys = torch.zeros(192, 1, D), torch.zeros(1, 384, D)
    for tile in range(3):
        keys[:, tile * 64 : tile * 64 + 64, tile] = 6.0
        q[tile * 64 : tile * 64 + 64, :, tile] = 6.0
    ctx = context(q, keys, 192)
    assert planned(ctx, alpha=0.5) is None
    alone = planned(ctx, alpha=0.5, union=False, sinks=0)
    assert [listed(alone, 0, t) for t in range(3)] == [[0, 3], [1, 4], [2, 5]]


def test_the_last_tiles_are_dense_and_unite_nothing() -> None:
    """Of a prompt of 6 tiles and a bit: its last two read all; what they look at is not given to the others."""
    q, keys = torch.zeros(150, 1, D), torch.zeros(1, 406, D)
    keys[:, 64:128, 0] = 6.0
    q[64:, :, 0] = 6.0
    keys[:, :64, 1] = 6.0
    q[:64, :, 1] = 6.0
    plan = planned(context(q, keys, 256, 406), alpha=0.5, dense=2)
    assert listed(plan, 0, 0) == [0, 3, 4, 5, 6]
    assert plan.band[plan.tile_map.long(), 1].tolist() == [0, DENSE, DENSE]
    assert planned(context(q[:100], keys, 306, 406), alpha=0.5, dense=3) is None


def test_tokens_without_a_row_and_tiles_without_any() -> None:
    """Entries are fewer than ordinals: blocks count entries, tiles ordinals."""
    generator = torch.Generator().manual_seed(3)
    tok = torch.cat([torch.arange(1000, 1010), torch.arange(1130, 1140)])  # nobody in [1024, 1088)
    ctx = context(torch.randn(20, 2, D, generator=generator), torch.randn(2, 320, D, generator=generator), 300, tok=tok)
    for union in (True, False):
        plan = planned(ctx, alpha=0.97, union=union)
        want = by_hand(ctx, CompactConfig(**{**SMALL, "alpha": 0.97}))
        assert plan is not None and len(plan.tile_map) == 3
        if not union:
            assert {key: set(listed(plan, *key)) for key in want} == want and listed(plan, 0, 1) == []


def test_what_is_dense() -> None:
    q, keys = torch.randn(64, 2, D), torch.randn(1, 320, D)
    assert planned(context(q, keys, 256), alpha=0.0) is None
    assert planned(context(q, keys, 256), alpha=0.0, union=False) is None
    assert planned(context(q, keys[:, :64], 0), alpha=1.0) is None  # a first chunk
    assert planned(context(q, keys, 256, 200), alpha=1.0) is None  # generated tokens
    read = [planned(context(q, keys, 256), alpha=alpha) for alpha in (1.0, 0.8, 0.3)]
    counts = [len(plan.blk_idx) if plan is not None and plan.blk_idx is not None else 10 for plan in read]
    assert counts == sorted(counts) and counts[0] < 10


def test_parts_of_a_large_group() -> None:
    ctx = context(torch.zeros(1, 14, D), torch.zeros(2, 1, D), 0)
    assert sub_groups(ctx, 4).tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 3
    assert sub_groups(ctx, 7).tolist() == [0] * 7 + [1] * 7


@pytest.mark.parametrize("bad", [{"alpha": 2}, {"window": 0}, {"block": 96}, {"chunk": 1000}])
def test_bad_settings_are_told(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        CompactConfig(**bad)
