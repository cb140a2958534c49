"""Plan transforms against the plain meaning of a plan: they keep what each row of each head sees."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.transforms import by_head, dense_like, reblock, retile
from firstlight.core.attn import DENSE, AttnPlan

HEADS, KEYS = 6, 400


def some_plan(rng: random.Random, q_tile: int, blk: int, first: int, last: int) -> AttnPlan:
    """Any plan for rows [first, last] of one request."""
    lists, slots = rng.randint(1, 3), rng.randint(1, 3)
    rows, tiles = lists * slots, last // q_tile - first // q_tile + 1
    bands = [(0, 0), (0, DENSE), (rng.randrange(80), rng.randrange(1, 90)), (17, 30)]
    head_map = [*range(lists), *(rng.randrange(lists) for _ in range(HEADS - lists))]
    rng.shuffle(head_map)
    tables = {}
    for name, most in (("blk", -(-KEYS // blk)), ("col", KEYS)):
        chosen = [sorted(rng.sample(range(most), rng.randint(0, min(most, 9)))) for _ in range(rows)]
        if rng.random() < 0.7:
            ends = [sum(map(len, chosen[:i])) for i in range(rows + 1)]
            tables[f"{name}_ptr"] = torch.tensor(ends, dtype=torch.int32)
            tables[f"{name}_idx"] = torch.tensor([x for row in chosen for x in row], dtype=torch.int32)
    return AttnPlan(
        q_tile=q_tile,
        blk=blk,
        head_map=torch.tensor(head_map, dtype=torch.int16),
        tile_base=torch.tensor([0, tiles], dtype=torch.int32),
        tile_first=torch.tensor([first // q_tile], dtype=torch.int32),
        tile_map=torch.tensor([rng.randrange(slots) for _ in range(tiles)], dtype=torch.int32),
        band=torch.tensor([rng.choice(bands) for _ in range(rows)], dtype=torch.int32),
        **tables,
    )


def seen(plan: AttnPlan | None, first: int, last: int) -> Tensor:
    """bool [rows, HEADS, KEYS]: what the definition in core/attn.py says, but for causality."""
    out = torch.zeros(last - first + 1, HEADS, KEYS, dtype=torch.bool)
    if plan is None:
        return ~out
    key = torch.arange(KEYS)
    for t in range(first, last + 1):
        slot = int(plan.tile_map[t // plan.q_tile - int(plan.tile_first[0])])
        for number in range(plan.num_lists):
            row = slot * plan.num_lists + number
            sink, window = plan.band[row].tolist()
            see = (key < sink) | ((t - key < window) if window > 0 else torch.tensor(window == DENSE))
            for ptr, idx, unit in ((plan.blk_ptr, plan.blk_idx, plan.blk), (plan.col_ptr, plan.col_idx, 1)):
                if ptr is not None and idx is not None:
                    see = see | torch.isin(key // unit, idx[int(ptr[row]) : int(ptr[row + 1])])
            out[t - first, plan.head_map == number] = see
    return out


@given(seed=st.integers(0, 10**6))
def test_each_head_follows_its_own_plan(seed: int) -> None:
    rng = random.Random(seed)
    first = rng.randrange(200)
    last = first + rng.randrange(60)
    plans = [some_plan(rng, rng.choice([16, 32, 128]), rng.choice([16, 64, 128]), first, last) for _ in range(2)]
    chosen, rest = (None if rng.random() < 0.2 else plan for plan in plans)
    heads = torch.tensor([rng.random() < 0.5 for _ in range(HEADS)])
    want = torch.where(heads[None, :, None], seen(chosen, first, last), seen(rest, first, last))
    assert torch.equal(seen(by_head(heads, chosen, rest), first, last), want)


@given(seed=st.integers(0, 10**6))
def test_smaller_tiles_and_blocks_say_the_same(seed: int) -> None:
    rng = random.Random(seed)
    first = rng.randrange(200)
    last = first + rng.randrange(60)
    plan = some_plan(rng, 128, 128, first, last)
    assert torch.equal(seen(reblock(retile(plan, 32), 16), first, last), seen(plan, first, last))
    assert bool(seen(dense_like(plan, HEADS), first, last).all())
