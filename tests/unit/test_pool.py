"""The block pool and the block table against plain models of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.cache.pool import Pool
from firstlight.cache.table import RequestKV
from firstlight.cache.windows import Windows
from firstlight.kernels.kv_layout import BLOCK

seeds = st.integers(0, 10**6)
D = 4


@settings(max_examples=60)
@given(seed=seeds)
def test_every_block_is_accounted_for(seed: int) -> None:
    """Against two counters: how many requests hold a block, and whether the cache marks it."""
    rng, pool = random.Random(seed), Pool(30, D, torch.float32)
    held, marked = np.zeros(31, int), np.zeros(31, bool)

    def some(allowed: np.ndarray) -> np.ndarray:
        choices = np.flatnonzero(allowed)
        return np.array(sorted(rng.sample(list(choices), rng.randint(0, len(choices)))), np.int32)

    for _ in range(40):
        what = rng.choice(["take", "hold", "release", "mark", "unmark"])
        if what == "take" and pool.free:
            ids = pool.take(rng.randint(0, pool.free))
            assert not held[ids].any() and not marked[ids].any() and (ids > 0).all()
            held[ids] += 1
        elif what == "hold":
            pool.hold(ids := some((held > 0) | marked))
            held[ids] += 1
        elif what == "release":
            pool.release(ids := some(held > 0))
            held[ids] -= 1
        elif what == "mark":
            pool.mark(ids := some((held > 0) & ~marked))
            marked[ids] = True
        elif what == "unmark":
            pool.unmark(ids := some(marked))
            marked[ids] = False
        pool.check()
        assert pool.used == (held > 0).sum() and pool.cached == (marked & (held == 0)).sum()
        assert pool.shared(np.arange(1, 31)).tolist() == ((held > 1) | marked)[1:].tolist()


def test_a_block_comes_back_zeroed() -> None:
    pool = Pool(3, D, torch.float32)
    first = pool.take(3)
    pool.layout.k[1:] = pool.layout.v[1:] = torch.nan
    pool.release(first)
    ids = torch.from_numpy(pool.take(2).astype(np.int64))
    assert (pool.layout.k[ids] == 0).all() and (pool.layout.v[ids] == 0).all()


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_what_is_not_written_is_zeroed(n: int) -> None:
    """And no more: blocks that rows fill aren't touched."""
    pool = Pool(16, D, torch.float32)
    used = pool.take(16)
    pool.layout.k[1:] = pool.layout.v[1:] = torch.nan
    pool.release(used)
    kv, tok = RequestKV(pool, 2, 2), torch.arange(n)
    kv.provide((0, 2), n, n)
    blocks = torch.from_numpy(kv.table[:, :, : n // BLOCK].astype(np.int64).ravel())
    assert pool.layout.k[blocks].isnan().all()
    for layer in range(2):
        kv.write(layer, tok, tok, torch.ones(n, 2, D), torch.ones(n, 2, D))
    held = torch.from_numpy(kv.table.astype(np.int64).ravel())
    assert not pool.layout.k[held].isnan().any() and not pool.layout.v[held].isnan().any()


def test_releasing_twice_is_caught() -> None:
    pool = Pool(3, D, torch.float32)
    ids = pool.take(1)
    pool.release(ids)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(ids)


def read(kv: RequestKV, layer: int, head: int) -> dict[int, float]:
    """Ordinal -> first number of its key, through the view as a kernel sees it."""
    view = kv.view(layer)
    k, v = kv.pool.layout.read_blocks(view.table[head : head + 1])
    assert torch.equal(k[0] * 2, v[0])
    n = view.length[head]
    tok = torch.arange(n) if view.tok is None else view.tok[head, :n]
    assert torch.equal(tok, tok.sort().values), "views are sorted by ordinal"
    return dict(zip(tok.tolist(), k[0, :n, 0].tolist()))


@settings(max_examples=60)
@given(seed=seeds)
def test_writes_are_upserts_by_ordinal(seed: int) -> None:
    """Chunks, gaps, overwrites, revived ordinals, cuts: each layer and head equals a dictionary."""
    rng, pool = random.Random(seed), Pool(400, D, torch.float32)
    kv = RequestKV(pool, 2, 3)
    want: list[list[dict[int, float]]] = [[{} for _ in range(3)] for _ in range(2)]
    for step in range(12):
        layer = rng.randrange(2)
        top = max(want[layer][0], default=-1) + 1
        first = rng.choice([top, top, rng.randint(0, top)])
        tok = [t for t in range(first, first + rng.randint(1, 90)) if rng.random() < rng.choice([1, 1, 0.6])]
        if rng.random() < 0.2 and want[layer][0]:
            idx = []
            for head in range(3):
                order = sorted(want[layer][head])
                kept = sorted(rng.sample(range(len(order)), rng.randint(1, len(order))))
                idx.append(torch.tensor(kept))
                want[layer][head] = {order[i]: want[layer][head][order[i]] for i in kept}
            kv.keep(layer, idx)
        elif tok:
            values = torch.tensor([float(step * 1000 + t) for t in tok])
            k = values[:, None, None] + torch.arange(3)[None, :, None] / 8 + torch.zeros(1, 1, D)
            kv.provide((layer, layer + 1), len(tok))
            kv.write(layer, torch.tensor(tok), torch.tensor(tok), k, 2 * k)
            for head in range(3):
                want[layer][head] |= {t: float(k[i, head, 0]) for i, t in enumerate(tok)}
        for lay in range(2):
            assert [read(kv, lay, h) for h in range(3)] == want[lay]
        pool.check()
    kv.release()
    assert pool.free == pool.total


def test_shared_blocks_are_copied_before_a_write() -> None:
    pool = Pool(40, D, torch.float32)
    first, second = RequestKV(pool, 1, 2), RequestKV(pool, 1, 2)
    tok = torch.arange(BLOCK)
    k = torch.ones(BLOCK, 2, D)
    first.provide((0, 1), BLOCK)
    first.write(0, tok, tok, k, 2 * k)
    pool.mark(first.column(0).ravel())
    pool.hold(first.column(0).ravel())
    second.adopt([first.column(0)], BLOCK)
    second.write(0, tok[5:9], tok[5:9], 7 * k[:4], 14 * k[:4])
    assert set(read(first, 0, 1).values()) == {1.0}
    assert [read(second, 0, 1)[t] for t in (4, 5, 8, 9)] == [1.0, 7.0, 7.0, 1.0]
    first.release()
    second.release()
    pool.check()
    assert pool.cached == 2


@pytest.mark.parametrize("first", ["write", "places"])
def test_reservations_are_used_before_anything_else(first: str) -> None:
    pool = Pool(40, D, torch.float32)
    kv = RequestKV(pool, 2, 2)
    kv.reserve(8)
    assert pool.available == 32
    kv.provide((0, 2), 70)
    assert (kv.reserved, pool.reserved, pool.available) == (0, 0, 32)
    tok = torch.arange(70)
    k = torch.ones(70, 2, D)
    for layer in range(2):
        if first == "places":
            places = kv.places((layer, layer + 1), tok, tok)
            assert places is not None
            kv.pool.layout.write(places.slots[0], k, 2 * k)
            kv.grow((layer, layer + 1), places.ends)
        else:
            kv.write(layer, tok, tok, k, 2 * k)
    assert kv.missing((0, 2), 58) == 0 and kv.missing((0, 2), 59) == 4
    assert len(read(kv, 1, 1)) == 70


@pytest.mark.parametrize("windowed", [False, True])
def test_what_surely_has_its_place_lacks_no_block(windowed: bool) -> None:
    """The quick answer, against the table's own count; it speaks for whole tables only."""
    windows = Windows(70, np.ones((2, 1), bool)) if windowed else None
    kv = RequestKV(Pool(40, D, torch.float32), 2, 1, windows)
    sure = 0
    for t in range(3 * BLOCK):
        if kv.has_place(t):
            sure += 1
            assert kv.missing((0, 2), 1) == 0
        kv.provide((0, 2), 1)
        kv.grow((0, 2), np.full((2, 1), t + 1))
    assert sure == (0 if windowed else 3 * (BLOCK - 1))
