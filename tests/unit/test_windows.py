"""Rows with a window, of layers or streaming heads: what is behind it is really freed, and promises are kept."""

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
from firstlight.core.parts import Streams
from firstlight.kernels.kv_layout import BLOCK
from firstlight.reuse.prefix import PrefixCache

D, HEADS = 2, 2
NUM_LAYERS = 3
LAYERS = np.repeat([[True], [False], [True]], HEADS, axis=1)
HEADS_OF_LAYERS = np.array([[True, False], [False, False], [False, True]])
seeds = st.integers(0, 10**6)


def some_windows(rng: random.Random) -> Windows:
    margin, every = rng.choice([(0, 0), (rng.randint(0, 130), rng.choice([256, 448, 1024]))])
    rows, sink = rng.choice([(LAYERS, 0), (HEADS_OF_LAYERS, 0), (HEADS_OF_LAYERS, rng.choice([1, 48, 64, 200]))])
    return Windows(rng.choice([1, 2, 63, 64, 65, 128, rng.randint(1, 300)]), rows, margin, every, sink)


def write(kv: RequestKV, layer: int, first: int, end: int) -> None:
    tok = torch.arange(first, end)
    k = (tok.float()[:, None, None] + torch.arange(HEADS)[None, :, None] / 8).expand(-1, -1, D)
    places = kv.places((layer, layer + 1), tok, tok)
    if places is None:
        kv.write(layer, tok, tok, k, 2 * k)
    else:
        kv.pool.layout.write(places.slots[0], k, 2 * k)
        kv.grow((layer, layer + 1), places.ends)


def reads(kv: RequestKV, layer: int, head: int, entries: range) -> bool:
    """Whether entries of a row are what was written."""
    k, v = kv.pool.layout.read_blocks(kv.view(layer).table[head : head + 1])
    want = torch.arange(entries.start, entries.stop) + head / 8
    part = slice(entries.start, entries.stop)
    return torch.equal(k[0, part, 0], want) and torch.equal(v[0, part, 0], 2 * want)


@settings(max_examples=60)
@given(seed=seeds)
def test_a_request_never_holds_more_than_it_was_promised(seed: int) -> None:
    rng = random.Random(seed)
    windows, total = some_windows(rng), rng.randint(1, 1500)
    chunk = rng.choice([total, 100, 1024])
    promised = windows.promise(total + 1, chunk)
    assert promised <= HEADS * NUM_LAYERS * -(-(total + 1) // BLOCK)
    pool = Pool(promised, D, torch.float32)
    kv = RequestKV(pool, NUM_LAYERS, HEADS, windows)
    kv.reserve(promised)
    done = 0
    while done < total:
        end = min(total, done + min(chunk, rng.choice([1, 1, 40, 64, rng.randint(1, 700)])))
        kv.provide((0, NUM_LAYERS), end - done)
        for layer, row in enumerate(windows.rows):
            write(kv, layer, done, end)
            for head, has_window in enumerate(row):
                assert reads(kv, layer, head, range(max(0, done - windows.size + 1) if has_window else 0, end))
                assert reads(kv, layer, head, range(min(windows.sink, end)))
            kv.leave_behind([layer], end)
            pool.check()
            assert pool.used + kv.reserved == promised, "what is freed stays promised to the prompt"
            assert kv.nbytes == pool.used * pool.block_nbytes
        done = end
    behind = max(0, total - windows.size - windows.margin + 1) // BLOCK
    local = kv.table[0, 0, :behind]
    assert (local[~windows.stays(np.arange(behind))] == 0).all(), "not freed"
    assert (kv.table[~windows.rows] > 0).all() and pool.available == 0
    kv.settle()
    assert kv.reserved == kv.missing((0, NUM_LAYERS), 1) <= HEADS * NUM_LAYERS
    kv.release()
    assert pool.free == pool.total and pool.reserved == 0


def test_streaming_half_of_the_heads_takes_little_more_than_half() -> None:
    """smollm2 at 8,000 tokens in chunks of 1,024, wherever its streaming heads lie."""
    dice = random.Random(1)
    heads = [[dice.random() < 0.5 for _ in range(3)] for _ in range(30)]
    windows = Windows.streaming(Streams(heads, 64, 256))
    assert windows is not None and windows.margin == windows.every == 0
    share = sum(map(sum, heads)) / 90
    assert windows.promise(8001, 1024) <= (1 - share + 0.08) * 90 * 126
    assert Windows.streaming(Streams([[False] * 3] * 30, 64, 256)) is None


def test_places_that_keep_their_window_can_all_be_ended_at() -> None:
    """At every multiple of `every`, a row there and the margin's rows before it find all that they read."""
    windows = Windows(100, LAYERS, margin=128, every=512)
    for done in range(0, 5000, 97):
        first = windows.first(done)
        held = np.concatenate([np.flatnonzero(windows.stays(np.arange(first))), np.arange(first, done // BLOCK + 1)])
        ends = [*range(512, done + 1, 512), done]
        for end in ends:
            needed = np.arange(max(0, end - 128 - 100 + 1) // BLOCK, -(-end // BLOCK))
            assert np.isin(needed, held).all(), (done, end)
    assert Windows.of((None, 100), HEADS, cached=True).every == 4096
    assert Windows.of((None, 4096), HEADS, cached=True).every == 8 * 4096
    assert Windows.of((None, 100), HEADS, cached=False).margin == 0
    assert Windows.of((None, None), HEADS, cached=True) is None


class Shelf:
    """A cache over columns of two layers, one block each; layer 0 is local."""

    def __init__(self) -> None:
        self.pool = Pool(100, D, torch.float32)
        self.cache = PrefixCache(self.pool, 4, b"salt", [8, None])

    def keep(self, ids: list[int], whole: set[int]) -> None:
        """A request publishes; only `whole` columns still have their local block."""
        table = self.pool.take(2 * -(-len(ids) // 4)).reshape(2, -1)
        for number in set(range(table.shape[1])) - whole:
            self.pool.release(table[:1, number])
            table[0, number] = 0
        self.cache.publish(b"root", ids, lambda b: table[:, b].copy())
        self.pool.release(table.ravel())
        self.pool.check()

    def hit(self, ids: list[int], window: int | None = 8, rows: int = 1) -> tuple[int, list[int]]:
        """Tokens of the hit, and the columns of which it has the local block."""
        hit = self.cache.match(b"root", ids, rows, window)
        assert all(column[1] > 0 for column in hit.columns)
        held = [number for number, column in enumerate(hit.columns) if column[0]]
        return hit.num_tokens, held + ([len(hit.columns)] if hit.partial is not None and hit.partial[0] else [])


def test_a_hit_ends_only_where_the_last_window_is_held() -> None:
    shelf, ids = Shelf(), list(range(40))
    shelf.keep(ids, whole={4, 5, 7, 8, 9})
    assert shelf.hit([*ids, 99]) == (40, [8, 9]), "columns behind the window are shared without their local block"
    assert shelf.hit(ids) == (40, [8, 9])
    assert shelf.hit(ids, rows=5) == (40, [7, 8, 9]), "rows that are computed anyway read a window too"
    assert shelf.hit(ids, rows=9) == (24, [4, 5]), "their window is gone: the next place before that has one"
    assert shelf.hit(ids[:30]) == (24, [4, 5]) and shelf.hit([*ids[:24], 99]) == (24, [4, 5])
    assert shelf.hit([*ids[:23], 99]) == (23, [4, 5]), "a part of a column will do"
    assert shelf.hit(ids[:16]) == (0, []) and shelf.hit([*ids, 99], window=None) == (0, [])
    why = shelf.cache.match(b"root", ids[:16], 1, 8).reason
    assert "no window is kept at token 16" in why


def test_another_request_brings_what_a_known_column_lacks() -> None:
    shelf, ids = Shelf(), list(range(24))
    shelf.keep(ids, whole={4, 5})
    shelf.keep(ids[:12], whole={0, 1, 2})
    assert shelf.hit([*ids[:12], 99]) == (12, [1, 2]) and shelf.hit([*ids, 99]) == (24, [4, 5])
    assert shelf.hit([*ids[:12], 99], window=None) == (12, [0, 1, 2])
    shelf.cache.clear()
    shelf.pool.check()
    assert shelf.pool.free == shelf.pool.total


@pytest.mark.parametrize("limit", [40, 39, 30, 24, 23, 20, 5, 0])
def test_a_limit_is_kept(limit: int) -> None:
    shelf, ids = Shelf(), list(range(40))
    shelf.keep(ids, whole={4, 5, 7, 8, 9})
    end = shelf.cache.match(b"root", ids, 1, 8, limit).num_tokens
    assert end <= limit and (end > 0) == (limit >= 23)
