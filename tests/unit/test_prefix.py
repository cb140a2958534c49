"""The prefix cache alone, and under the engine: with it or without it, the answers are the same bits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.cache.pool import Pool
from firstlight.core.registry import recipe
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.reuse.prefix import PrefixCache
from tests.tiny import VOCABULARY, tiny_engine

ROOT = b"root"


class Shelf:
    """A pool of one block a column, and a cache over it."""

    def __init__(self, blocks: int = 50) -> None:
        self.pool = Pool(blocks, 4, torch.float32)
        self.cache = PrefixCache(self.pool, 4, b"salt")

    def keep(self, ids: list[int], root: bytes = ROOT) -> None:
        """A request with these ids comes, publishes and goes."""
        mine = self.pool.take(-(-len(ids) // 4))
        self.cache.publish(root, ids, lambda b: mine[b : b + 1])
        self.pool.release(mine)
        self.pool.check()

    def hit(self, ids: list[int], root: bytes = ROOT) -> int:
        return self.cache.match(root, ids).num_tokens


def test_hits_are_the_longest_known_beginning() -> None:
    shelf = Shelf()
    shelf.keep([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert shelf.hit([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 9
    assert shelf.hit([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == 9
    assert shelf.hit([1, 2, 3, 4, 5, 6, 0, 8, 9]) == 6, "a beginning of a column counts too"
    assert shelf.hit([1, 2, 3]) == 3 and shelf.hit([2, 1]) == 0 and shelf.hit([]) == 0
    assert shelf.hit([1, 2, 3, 4], b"other recipe") == 0


def test_it_says_why_not_more() -> None:
    shelf = Shelf()
    why = lambda ids, root=ROOT: shelf.cache.match(root, ids).reason  # noqa: E731
    assert "nothing cached" in why([1, 2, 3, 4])
    shelf.keep([1, 2, 3, 4, 5, 6, 7, 8])
    assert why([1, 2, 3, 4]) == ""
    assert "token 6" in why([1, 2, 3, 4, 5, 6, 0, 0])
    assert "no cached prompt" in why([9, 9])
    shelf.cache.evict(1)
    assert "evicted from token 4" in why([1, 2, 3, 4, 5, 6, 7, 8])


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_everything_unheld_can_be_freed(seed: int) -> None:
    """Requests that overlap in time publish under one another's columns; what is counted as cached can be evicted."""
    rng, shelf = random.Random(seed), Shelf()
    running: list[np.ndarray] = []
    for _ in range(30):
        if running and rng.random() < 0.5:
            shelf.pool.release(running.pop(rng.randrange(len(running))))
        elif shelf.pool.free > 5:
            ids = [rng.randrange(2) for _ in range(rng.randint(1, 18))]
            mine = shelf.pool.take(-(-len(ids) // 4))
            shelf.cache.publish(ROOT, ids, lambda b, mine=mine: mine[b : b + 1])
            running.append(mine)
        if rng.random() < 0.2:
            before, wanted = shelf.pool.free, rng.randint(0, shelf.pool.cached)
            shelf.cache.evict(wanted)
            assert shelf.pool.free >= before + wanted
        shelf.pool.check()
    for mine in running:
        shelf.pool.release(mine)
    shelf.cache.clear()
    assert shelf.pool.free == shelf.pool.total and len(shelf.cache) == 0


def test_a_chain_deeper_than_the_stack_can_be_dropped() -> None:
    """One request published the beginning and left; another holds all that follows."""
    shelf = Shelf(3000)
    first, rest = shelf.pool.take(1), shelf.pool.take(2000)
    shelf.cache.publish(ROOT, [1] * 4, lambda b: first)
    shelf.cache.publish(ROOT, [1] * 8000, lambda b: rest[b : b + 1])
    shelf.pool.release(first)
    shelf.cache.evict(1)
    shelf.pool.check()
    assert shelf.pool.free == 1000 and len(shelf.cache) == 0


def test_a_column_held_in_part_frees_the_rest() -> None:
    pool = Pool(8, 4, torch.float32)
    cache = PrefixCache(pool, 4, b"salt")
    column = pool.take(4).reshape(2, 2)
    cache.publish(ROOT, [1, 2, 3, 4], lambda b: column)
    pool.release(column[0])
    assert (pool.used, pool.cached, pool.free) == (2, 2, 4)
    cache.evict(2)
    assert (pool.used, pool.cached, pool.free) == (2, 0, 6)


def ask(engine: Engine, ids: list[int], rid: str, new: int = 3) -> tuple[LiveRequest, dict[int, Any]]:
    """Logits of all prompt rows that were computed, the tokens under -1."""
    rows: dict[int, Any] = {}
    sink = lambda tok, logits: rows.update(zip(tok.tolist(), logits.clone()))  # noqa: E731
    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    live = engine.add(Request(rid, ids, sampling, logits_at="all", logits_sink=sink))
    while engine.has_work:
        engine.step()
        engine.pool.check()
    return live, rows | {-1: live.ids[live.num_prompt :]}


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_on_equals_off_bit_for_bit(precision: str, seed: int) -> None:
    rng = random.Random(seed)
    base = [rng.randrange(VOCABULARY) for _ in range(300)]
    on = tiny_engine(precision=precision, deterministic=True)
    off = tiny_engine(precision=precision, deterministic=True, prefix_cache="off")
    hits = 0
    for i in range(6):
        shared = rng.choice([0, 64, 128, 100, 200, 256])
        ids = base[:shared] + [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 1, 30, 64]))]
        ids = ids or base[:1]
        live, got = ask(on, ids, f"r{i}")
        _, want = ask(off, ids, f"r{i}")
        assert live.n_cached <= len(ids) - 1 and len(got) == len(ids) - live.n_cached + 1
        assert all(torch.equal(torch.as_tensor(got[t]), torch.as_tensor(want[t])) for t in got)
        hits += live.n_cached > 0
        if rng.random() < 0.2:
            assert on.cache is not None
            on.cache.evict(rng.randint(1, 20))
    assert on.pool.used == 0


def test_a_whole_hit_computes_one_row_and_writes_none() -> None:
    engine = tiny_engine(deterministic=True)
    for length in (64, 128, 100):
        ids = [(7 * i + length) % VOCABULARY for i in range(length)]
        first, want = ask(engine, ids, "a")
        again, got = ask(engine, ids, "b")
        assert (first.n_cached, again.n_cached, again.computed) == (0, length - 1, [1, 1]), "one row in two layers"
        assert got[-1] == want[-1] and torch.equal(got[length - 1], want[length - 1])


def test_recipes_are_kept_apart() -> None:
    """One cache under an exact engine and one of `band`, over one pool: neither finds the other's cells."""
    ids = [i % VOCABULARY for i in range(200)]
    exact, band = tiny_engine(), tiny_engine(method=["band:sink=4,window=8"])
    again = tiny_engine(method=["band:sink=4,window=9"])
    assert exact.cache is not None
    roots = set()
    for engine in (exact, band, again):
        engine.admission.cache = exact.cache
        facts = ("tiny-llama-2", str(engine.pool.layout.dtype), recipe(engine.parts))
        engine.admission.root = exact.cache.root(*facts)
        roots.add(engine.admission.root)
    assert len(roots) == 3
    ask(exact, ids, "a")
    assert exact.cache.match(exact.admission.root, ids).num_tokens == 200
    assert exact.cache.match(band.admission.root, ids).num_tokens == 0
    assert recipe(exact.parts) == "" != recipe(band.parts)
