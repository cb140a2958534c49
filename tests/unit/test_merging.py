"""Merging K/V entries: against plain loops over the paper's formulas, and inside a request's table."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from firstlight.cache.merging import merge_entries
from firstlight.cache.pool import Pool
from firstlight.cache.table import RequestKV

MODES = ["mean", "pivot", "weighted"]


def assignment(n: int, rng: random.Random) -> Tensor:
    """Each entry stays, or goes into one that stays."""
    stays = sorted(rng.sample(range(n), rng.randint(1, n)))
    return torch.tensor([i if i in stays else rng.choice(stays) for i in range(n)])


def by_hand(k: Tensor, v: Tensor, assign: Tensor, mode: str) -> tuple[list[int], Tensor, Tensor]:
    """k, v f64 [n, D]."""
    kept = [j for j in range(len(assign)) if assign[j] == j]
    out_k, out_v = [], []
    for j in kept:
        folded = [i for i in range(len(assign)) if assign[i] == j and i != j]
        sums = [k[j].clone(), v[j].clone()]
        for i in folded:
            cosine = k[i] @ k[j] / (k[i].norm() * k[j].norm())
            for x, total in zip((k, v), sums):
                total += {"mean": x[i], "pivot": (x[i] + x[j]) / 2, "weighted": cosine * x[i]}[mode]
        out_k.append(sums[0] / (len(folded) + 1))
        out_v.append(sums[1] / (len(folded) + 1))
    return kept, torch.stack(out_k), torch.stack(out_v)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), mode=st.sampled_from(MODES))
def test_merging_is_what_the_formulas_say(seed: int, n: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, n, 8, generator=generator, dtype=torch.float64)
    assign = assignment(n, random.Random(seed))
    kept, new_k, new_v = merge_entries(k.float(), v.float(), assign, mode)
    want, want_k, want_v = by_hand(k, v, assign, mode)
    assert kept.tolist() == want
    torch.testing.assert_close(new_k.double(), want_k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_v.double(), want_v, atol=1e-5, rtol=1e-5)


def test_an_entry_that_nothing_goes_into_stays_as_it_is() -> None:
    k = torch.randn(5, 4).bfloat16()
    kept, new_k, new_v = merge_entries(k, k, torch.arange(5), "pivot")
    assert kept.tolist() == [0, 1, 2, 3, 4] and torch.equal(new_k, k) and torch.equal(new_v, k)


@pytest.mark.parametrize("mode", MODES)
def test_a_table_keeps_what_others_were_folded_into(mode: str) -> None:
    """A shared block is copied first; blocks that are left over go back."""
    pool, heads, n = Pool(40, 16, torch.float32), 2, 150
    kv = RequestKV(pool, 1, heads)
    tok = torch.arange(n)
    k, v = torch.randn(2, n, heads, 16)
    kv.provide((0, 1), n)
    kv.write(0, tok, tok, k, v)
    shared = kv.column(0)
    pool.hold(shared.ravel())
    before = pool.layout.read(torch.arange(64) + 64 * int(shared[0, 0]))[0].clone()
    rng = random.Random(7)
    assign = [assignment(n, rng) for _ in range(heads)]
    assign[1] = torch.where(tok < 30, tok, 0)
    kv.merge(0, assign, mode)
    stored, _ = kv.entries(0)
    for head in range(heads):
        kept, want_k, _ = by_hand(k[:, head].double(), v[:, head].double(), assign[head], mode)
        m = int(kv.length[0, head])
        assert kv.ordinals(0)[head, :m].tolist() == kept
        torch.testing.assert_close(stored[head, :m].double(), want_k, atol=1e-5, rtol=1e-5)
    assert int(kv.num_blocks[0, 1]) == 1
    assert torch.equal(pool.layout.read(torch.arange(64) + 64 * int(shared[0, 0]))[0], before)
    pool.release(shared.ravel())
    kv.release()
    assert pool.used == 0
