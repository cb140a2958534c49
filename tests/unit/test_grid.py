"""The grid that planners stand on, where rows and entries may be missing; the probe; digests of blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.attention.grid import Grid
from firstlight.attention.probe import probed
from firstlight.cache.digests import Digests
from firstlight.cache.pool import Pool
from firstlight.cache.table import RequestKV
from firstlight.core.attn import PlanContext
from firstlight.kernels.kv_layout import BLOCK, Int8Layout, KVLayout

HEADS, KV_HEADS, D = 6, 2, 8


def some_pass(rng: random.Random, seed: int) -> PlanContext:
    """Some rows of a prompt of which some tokens were cut: neither rows nor entries are complete."""
    n = rng.randint(2, 300)
    alive = sorted(rng.sample(range(n), rng.randint(1, n))) if rng.random() < 0.5 else list(range(n))
    begin = rng.randrange(len(alive))
    tok = torch.tensor(alive[begin : begin + rng.randint(1, 150)])
    place = torch.searchsorted(torch.tensor(alive), tok)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(KV_HEADS, int(place[-1]) + 1, D, generator=generator)
    q = torch.randn(len(tok), HEADS, D, generator=generator)
    return PlanContext(0, q, tok, tok, KV_HEADS, n, True, lambda: keys, {}, place, D**-0.5)


@given(seed=st.integers(0, 10**6))
def test_tiles_and_blocks_of_incomplete_rows(seed: int) -> None:
    rng = random.Random(seed)
    ctx = some_pass(rng, seed)
    grid = Grid(ctx, rng.choice([16, 64]), rng.choice([16, 64]))
    assert ctx.place is not None
    x = torch.randn(len(ctx.tok), 3)
    for tile in range(grid.tiles):
        rows = ctx.tok // grid.q_tile == grid.first + tile
        own = ctx.place[rows]
        reach = {e // grid.blk for p in own.tolist() for e in range(p + 1)}
        assert set(grid.causal[tile].nonzero().flatten().tolist()) == reach
        middle = {p // grid.blk for p in range(int(own.min()), int(own.max()) + 1)} if len(own) else set()
        assert set(grid.diagonal[tile].nonzero().flatten().tolist()) == middle
        want = x[rows].mean(0) if len(own) else torch.zeros(3)
        torch.testing.assert_close(grid.pooled(x)[tile], want)


@given(seed=st.integers(0, 10**6))
def test_a_plan_says_what_the_masks_do(seed: int) -> None:
    rng = random.Random(seed)
    ctx = some_pass(rng, seed)
    grid = Grid(ctx, 16, 16)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(HEADS, grid.tiles, grid.num_blocks, generator=generator) < 0.3
    columns = torch.rand(HEADS, grid.tiles, grid.num_entries, generator=generator) < 0.1
    plan = grid.plan(blocks=blocks, columns=columns, band=(3, 5))
    assert (
        plan.blk_ptr is not None and plan.blk_idx is not None and plan.col_ptr is not None and plan.col_idx is not None
    )
    for tile in range(grid.tiles):
        for head in range(HEADS):
            row = int(plan.tile_map[tile]) * HEADS + int(plan.head_map[head])
            listed = plan.blk_idx[plan.blk_ptr[row] : plan.blk_ptr[row + 1]].long()
            single = plan.col_idx[plan.col_ptr[row] : plan.col_ptr[row + 1]].long()
            assert torch.equal(listed, (blocks[head, tile] & grid.causal[tile]).nonzero().flatten())
            assert not torch.isin(single // 16, listed).any()
            wanted = columns[head, tile].nonzero().flatten()
            wanted = wanted[(wanted < grid.end[tile]) & ~torch.isin(wanted // 16, listed)]
            assert torch.equal(single, wanted)


@given(seed=st.integers(0, 10**6))
def test_the_probe_is_the_softmax_of_the_last_rows(seed: int) -> None:
    rng = random.Random(seed)
    ctx = some_pass(rng, seed)
    last, keys = rng.randint(1, 70), ctx.keys()
    assert ctx.place is not None
    place = ctx.place[-last:]
    mass, distance = torch.zeros(2, HEADS, keys.shape[1])
    for i, own in enumerate(place.tolist()):
        for head in range(HEADS):
            q, k = ctx.q[-len(place) :][i, head], keys[head // (HEADS // KV_HEADS), : own + 1]
            want = (k @ q * ctx.scale).softmax(0)
            mass[head, : own + 1] += want
            distance[head, : own + 1] += want.flip(0)
    for got, wanted in zip(map(torch.cat, zip(*probed(ctx, last))), (mass, distance)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("kind", "dtype"), [(KVLayout, "float32"), (KVLayout, "bfloat16"), (Int8Layout, "bfloat16")])
def test_products_with_keys_where_they_lie(kind: type[KVLayout], dtype: str) -> None:
    """Of rows that no number of the blocks' type is, as precise as float32; of heads' blocks in any order."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(300, 2, 32, generator=generator).to(getattr(torch, dtype))
    rows = torch.randn(5, 32, generator=generator)
    table, layout = kind.holding(k, k)
    for head, count in ((0, 300), (1, 129)):
        out = torch.empty(5, count)
        layout.product(rows, table[head], out)
        want = rows.double() @ layout.read_keys(table)[head, :count].double().T
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_digests_follow_what_is_written(seed: int) -> None:
    """Appended to, overwritten, cut, copied on write: a digest is that of the keys that are there now."""
    rng, pool = random.Random(seed), Pool(80, D, torch.float32)
    digests, generator = Digests(pool, ["mean_k", "unit_k"]), torch.Generator().manual_seed(seed)
    kv = RequestKV(pool, 1, KV_HEADS)
    for _ in range(6):
        kv.provide((0, 1), 90)
        length = int(kv.length[0, 0])
        first = length if rng.random() < 0.6 else rng.randint(0, length)
        tok = torch.arange(first, first + rng.randint(1, 90))
        k = torch.randn(len(tok), KV_HEADS, D, generator=generator)
        if (places := kv.places((0, 1), tok, tok)) is not None and rng.random() < 0.5:
            pool.layout.write(places.slots[0], k, k)
            kv.grow((0, 1), places.ends)
        else:
            kv.write(0, tok, tok, k, k)
        if rng.random() < 0.2:
            stay = torch.arange(int(kv.length[0, 0]))[:: rng.randint(1, 3)]
            kv.keep(0, [stay] * KV_HEADS)
        keys, _ = kv.entries(0)
        view = kv.view(0)
        for name, plain in (("mean_k", lambda part: part.mean(1)), ("unit_k", lambda part: 1 / part.norm(dim=2))):
            got = digests.read(name, view.table, max(view.length))
            for block in range(-(-keys.shape[1] // BLOCK)):
                want = plain(keys[:, block * BLOCK : (block + 1) * BLOCK])
                torch.testing.assert_close(got[:, block, : want.shape[1]], want)


def test_a_cached_block_brings_its_digest_along() -> None:
    pool = Pool(8, D, torch.float32)
    digests, kv = Digests(pool, ["mean_k"]), RequestKV(pool, 1, KV_HEADS)
    kv.provide((0, 1), BLOCK)
    k = torch.randn(BLOCK, KV_HEADS, D)
    kv.write(0, torch.arange(BLOCK), torch.arange(BLOCK), k, k)
    first = digests.read("mean_k", kv.view(0).table, BLOCK).clone()
    pool.hold(column := kv.column(0).ravel())
    other = RequestKV(pool, 1, KV_HEADS)
    other.adopt([column.reshape(1, KV_HEADS)], BLOCK)
    pool.layout.k.fill_(torch.nan)  # nobody looks at the keys again
    assert torch.equal(digests.read("mean_k", other.view(0).table, BLOCK), first)
    pool.release(column)
    kv.release()
    fresh = pool.take(8)
    assert np.isin(column, fresh).all()
    pool.layout.k.fill_(0.0)
    again = digests.read("mean_k", torch.from_numpy(column.reshape(KV_HEADS, 1)), BLOCK)
    assert not again.any(), "a block that was given away kept its digest"
