"""Plan transforms against the plain meaning of a plan: rows keep what they see, or see more where that is asked."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.growing import coarsen, dense_rows, force, to_blocks, union
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


def no_bands(plan: AttnPlan) -> AttnPlan:
    return replace(plan, band=torch.zeros_like(plan.band))


def over(rng: random.Random, tiles: tuple[int, ...] = (16, 32, 128)) -> tuple[AttnPlan, int, int]:
    """Any plan, and the rows that it is for."""
    first = rng.randrange(200)
    last = first + rng.randrange(60)
    return some_plan(rng, rng.choice(tiles), rng.choice([16, 64, 128]), first, last), first, last


@given(seed=st.integers(0, 10**6), heads=st.sampled_from([1, 2, 3, 6]), tiles=st.booleans())
def test_shared_lists_hold_what_each_had(seed: int, heads: int, tiles: bool) -> None:
    plan, *rows = over(random.Random(seed))
    shared = coarsen(plan, heads, tiles)
    before, after = seen(plan, *rows), seen(shared, *rows)
    assert bool((after >= before).all()), "something is no longer seen"
    assert torch.equal(seen(coarsen(shared, heads, tiles), *rows), after)
    lists = seen(coarsen(no_bands(plan), heads, tiles), *rows)
    groups = seen(no_bands(plan), *rows).unflatten(1, (-1, heads)).any(2)
    if tiles:  # absolute tiles: those of the pass, rows or not
        groups = groups.any(0).expand_as(groups)
    assert torch.equal(lists, groups.repeat_interleave(heads, 1))


@given(seed=st.integers(0, 10**6))
def test_a_union_shows_what_either_does(seed: int) -> None:
    rng = random.Random(seed)
    one, first, last = over(rng)
    other = some_plan(rng, rng.choice([16, 32, 128]), rng.choice([16, 64, 128]), first, last)
    either = seen(one, first, last) | seen(other, first, last)
    assert bool((seen(union(one, other), first, last) >= either).all())
    lists = union(no_bands(one), no_bands(other))
    assert torch.equal(seen(lists, first, last), seen(no_bands(one), first, last) | seen(no_bands(other), first, last))


@given(seed=st.integers(0, 10**6), sink=st.integers(0, 90), recent=st.integers(0, 90))
def test_forced_bands_and_dense_rows(seed: int, sink: int, recent: int) -> None:
    rng = random.Random(seed)
    plan, first, last = over(rng)
    t, key = torch.arange(first, last + 1)[:, None, None], torch.arange(KEYS)
    band = (key < sink) | (t - key < recent if recent else torch.tensor(False))
    wider = seen(force(no_bands(plan), sink, recent), first, last)
    assert torch.equal(wider, seen(no_bands(plan), first, last) | band)
    assert bool((seen(force(plan, sink, recent), first, last) >= (seen(plan, first, last) | band)).all())
    dense = rng.randint(first, last + 70)
    want = seen(plan, first, last)
    want[(t >= dense // plan.q_tile * plan.q_tile)[:, 0, 0]] = True
    assert torch.equal(seen(dense_rows(plan, dense), first, last), want)


@given(seed=st.integers(0, 10**6))
def test_columns_become_their_blocks(seed: int) -> None:
    plan, *rows = over(random.Random(seed))
    made = to_blocks(no_bands(plan))
    assert made.col_ptr is None
    columns = seen(replace(no_bands(plan), blk_ptr=None, blk_idx=None), *rows)
    blocks = seen(replace(no_bands(plan), col_ptr=None, col_idx=None), *rows)
    padded = torch.nn.functional.pad(columns, (0, -KEYS % plan.blk))
    touched = padded.unflatten(2, (-1, plan.blk)).any(3).repeat_interleave(plan.blk, 2)[:, :, :KEYS]
    assert torch.equal(seen(made, *rows), blocks | touched)


def skipping(rng: random.Random, plan: AttnPlan, scan: int) -> AttnPlan:
    """The plan with a threshold for each head."""
    return replace(plan, skip_log=torch.tensor([[-rng.random() for _ in range(HEADS)]]), scan=scan)


@given(seed=st.integers(0, 10**6), scan=st.sampled_from([0, 1, 2]))
def test_thresholds_stay_with_their_heads(seed: int, scan: int) -> None:
    rng = random.Random(seed)
    plan, _, last = over(rng, tiles=(128,))
    plan = skipping(rng, plan, scan)
    made = [
        retile(plan, 32),
        reblock(plan, 16),
        coarsen(plan, 3, tiles=True),
        force(plan, 4, 40),
        to_blocks(plan),
        dense_rows(plan, last),
    ]
    assert plan.skip_log is not None
    assert all(each.skip_log is not None and each.skip_log.equal(plan.skip_log) for each in made)
    assert all(each.scan == scan for each in made)


@given(seed=st.integers(0, 10**6), scan=st.sampled_from([0, 1, 2]), others=st.sampled_from(["skip", "plan", "dense"]))
def test_each_head_skips_by_its_own_plan(seed: int, scan: int, others: str) -> None:
    """One without thresholds, and dense, never skip."""
    rng = random.Random(seed)
    plan, first, last = over(rng)
    one, rest = skipping(rng, plan, scan), some_plan(rng, rng.choice([16, 128]), 64, first, last)
    other = {"skip": skipping(rng, rest, scan), "plan": rest, "dense": None}[others]
    heads = torch.tensor([rng.random() < 0.5 for _ in range(HEADS)])
    never = torch.full((1, HEADS), -math.inf)
    spared = never if other is None or other.skip_log is None else other.skip_log
    for joined, mine in ((by_head(heads, one, other), heads), (by_head(heads, other, one), ~heads)):
        assert joined is not None and joined.skip_log is not None and joined.scan == scan
        assert joined.skip_log.equal(torch.where(mine, one.skip_log, spared))
