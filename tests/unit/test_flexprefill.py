"""`flexprefill` against its card's formulas in loops, on planted patterns, and where tokens or chunks cut across it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.flexprefill import FlexPrefill, FlexPrefillConfig, divergence, needed
from firstlight.core.attn import PlanContext
from firstlight.core.errors import UserError
from firstlight.core.registry import Method, classes, make_parts
from tests.unit.planted import DIM, GROUP, HEADS, KV_HEADS, context, density, planted, seen, some

pytestmark = pytest.mark.usefixtures("one_thread")
B = 64
SMALL = FlexPrefillConfig(gamma=0.6, min_budget=64, block=B)


def by_the_card(ctx: PlanContext, c: FlexPrefillConfig) -> dict[tuple[int, int], set[int]]:
    """(head, row block) -> key blocks: the card's steps 2 to 7, one number at a time."""
    assert ctx.place is not None
    n, size, scale = int(ctx.tok[-1]) + 1, c.block, ctx.scale
    nb, least, most = -(-n // size), -(-c.min_budget // size), -(-(c.max_budget or n) // size)
    first, rows = int(ctx.tok[0]) // size, ctx.tok.tolist()
    found = {}
    for h in range(HEADS):
        keys = ctx.keys()[h // GROUP].double()
        q = ctx.q[:, h].double()
        v, s = [0.0] * n, [0.0] * n
        probes = range(max(0, len(rows) - size), len(rows))
        for i in probes:
            weight = (q[i] @ keys[: rows[i] + 1].T * scale).softmax(0).tolist()
            for j, w in enumerate(weight):
                v[j] += w / len(probes)
                s[rows[i] - j] += w / len(probes)
        pooled = [[sum(x[b * size : (b + 1) * size]) for b in range(nb)] for x in (v, s)]
        means = torch.stack([keys[b * size : (b + 1) * size].mean(0) for b in range(nb)])
        guess = (q[probes.start :].mean(0) @ means.T * scale).softmax(0).tolist()
        apart = 0.0
        for a, b in zip(guess, pooled[0]):
            m = (a + b) / 2
            apart += 0.5 * sum(x * math.log(x / m) for x in (a, b) if x > 0)
        is_aware = math.sqrt(apart) < c.tau
        picks = []
        for x, pool in zip((v, s), pooled):
            total, count = 0.0, 0
            for w in sorted(x, reverse=True):
                total += w
                count += total <= c.gamma
            budget = least if is_aware else min(max((min(count + 1, n)) // size + 1, least), most)
            picks.append(sorted(range(nb), key=lambda b: (b != 0, -pool[b], b))[:budget])
        for r in range(first, nb):
            crossed = {r - m for m in picks[1]} | ({r - m - 1 for m in picks[1]} if c.slash_cover == "both" else set())
            found[h, r] = {b for b in {*picks[0]} | crossed if 0 <= b <= r}
        if is_aware:
            pairs = []
            for r in range(first, nb):
                mean = torch.stack([q[i] for i, t in enumerate(rows) if t // size == r]).mean(0)
                weight = (mean @ means[: r + 1].T * scale).softmax(0).tolist()
                pairs += [(-w, r, b) for b, w in enumerate(weight)]
            total = 0.0
            for w, r, b in sorted(pairs):
                total -= w
                if total > c.gamma * (nb - first):
                    break
                found[h, r].add(b)
    return found


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    lo=st.sampled_from([0, 0, 130, 192]),
    rows=st.sampled_from([192, 250]),
    tau=st.sampled_from([0.0, 0.12, 0.4, 0.9]),
    cover=st.sampled_from(["reference", "both"]),
    block=st.sampled_from([64, 128]),
    most=st.sampled_from([None, 128]),
)
def test_it_is_the_card(seed: int, lo: int, rows: int, tau: float, cover: str, block: int, most: int | None) -> None:
    config = FlexPrefillConfig(0.6, tau, 64, most, block, cover)
    ctx = some(seed, lo, lo + rows)
    mask = seen(FlexPrefill(config).plan(ctx), ctx)
    if lo + rows <= 2 * block:
        assert mask.equal(seen(None, ctx))
        return
    want = torch.zeros_like(mask)
    for (h, r), blocks in by_the_card(ctx, config).items():
        for b in blocks:
            want[ctx.tok // block == r, h, b * block : (b + 1) * block] = True
    assert mask.equal(want & seen(None, ctx))


def blocks_read(mask: Tensor, row: int) -> list[int]:
    """Whole blocks that a row of head 0 reads."""
    return [b for b in range(row // B + 1) if bool(mask[row, 0, b * B : min((b + 1) * B, row + 1)].all())]


def test_a_planted_column_is_read_by_all_rows_and_a_planted_slash_by_each() -> None:
    """By hand, with room for one beside block 0 and one beside the own.

    Key 200 is in block 3, and from the last 64 rows most often six blocks away; a distance of 320 is five blocks, and
    the last 64 rows look at block 4.
    """
    config = FlexPrefillConfig(0.9, 0.0, 128, block=B)
    ctx = planted(column=200)
    mask = seen(FlexPrefill(config).plan(ctx), ctx)
    assert [blocks_read(mask, row) for row in (639, 400)] == [[0, 3, 9], [0, 3, 6]]
    ctx = planted(distance=320)
    mask = seen(FlexPrefill(config).plan(ctx), ctx)
    assert [blocks_read(mask, row) for row in (639, 460, 330)] == [[0, 4, 9], [0, 2, 4, 7], [0, 4, 5]]


def test_a_slash_between_two_blocks_is_half_read_unless_both_are_asked_for() -> None:
    ctx = planted(distance=352)
    kept = {}
    for cover in ("reference", "both"):
        config = FlexPrefillConfig(0.9, 0.0, 128, block=B, slash_cover=cover)
        mask = seen(FlexPrefill(config).plan(ctx), ctx)[:, 0]
        kept[cover] = float(mask[torch.arange(448, 512), torch.arange(96, 160)].float().mean())
    assert kept == {"reference": 0.5, "both": 1.0}


def test_a_head_that_means_foretell_is_query_aware_and_reads_what_each_row_needs() -> None:
    """Blocks of equal keys: means are the truth. The last rows look at block 0, those of tile 5 at block 2."""
    codes = torch.eye(DIM)[:10].repeat_interleave(B, 0)
    wants = torch.zeros(640, dtype=torch.long)
    wants[5 * B : 6 * B] = 2
    q = (torch.eye(DIM)[wants] * 80)[:, None].expand(-1, HEADS, -1)
    ctx = context(q, codes.expand(KV_HEADS, -1, -1), torch.arange(640))
    aware, not_aware = (seen(FlexPrefill(replace(SMALL, tau=t, gamma=0.9)).plan(ctx), ctx) for t in (0.1, 0.0))
    assert [blocks_read(m, 6 * B - 1) for m in (aware, not_aware)] == [[0, 2, 5], [0, 5]]
    assert density(FlexPrefill(replace(SMALL, gamma=0.9)).plan(ctx), ctx) < 0.5


def test_equal_keys_need_gamma_of_all() -> None:
    mass = torch.full((2, 1000), 1e-3)
    assert needed(mass, 0.3005).tolist() == [301, 301] and needed(mass, 1.0)[0] == 1000
    assert needed(torch.tensor([[0.0, 1.0, 0.0]]), 0.9).tolist() == [1]


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.0]), min_size=2, max_size=9), st.integers(0, 99))
def test_divergence_is_symmetric_bounded_and_zero_where_there_is_none(mass: list[float], seed: int) -> None:
    a = torch.tensor([[1.0, *mass]])
    b = a[:, torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed))]
    a, b = a / a.sum(), b / b.sum()
    assert divergence(a, b).equal(divergence(b, a)) and not divergence(a, b).isnan().any()
    assert 0 <= float(divergence(a, b)) <= math.sqrt(math.log(2)) + 1e-6 and float(divergence(a, a)) < 1e-3
    assert float(divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))) == pytest.approx(0.8326, abs=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_density_grows_with_gamma_up_to_dense(tau: float) -> None:
    ctx = some(3, 0, 640)
    got = [density(FlexPrefill(replace(SMALL, gamma=g, tau=tau)).plan(ctx), ctx) for g in (0.2, 0.5, 0.8, 0.95, 1.0)]
    assert got == sorted(got) and got[0] < 0.7 and got[-1] == 1.0


def test_where_it_is_dense() -> None:
    ctx = some(0, 0, 640)
    assert FlexPrefill(replace(SMALL, gamma=1.0)).plan(ctx) is None
    assert FlexPrefill(FlexPrefillConfig(min_budget=640, block=B)).plan(ctx) is None
    assert FlexPrefill(SMALL).plan(replace(ctx, place=None)) is None
    assert FlexPrefill(SMALL).plan(some(0, 0, 128)) is None and FlexPrefill(SMALL).plan(some(0, 0, 129)) is not None


def test_rows_and_entries_may_be_missing() -> None:
    """Tiles without rows, tiles across block borders: every row still reads its own block and the first."""
    generator = torch.Generator().manual_seed(2)
    tok = (torch.rand(1200, generator=generator) < 0.4).nonzero()[:, 0]
    tok = tok[(tok < 200) | (tok > 700)]
    place = torch.arange(len(tok))
    full = some(1, 0, len(tok))
    for tau in (0.0, 0.9):
        ctx = context(full.q, full.keys(), tok, place)
        mask = seen(FlexPrefill(replace(SMALL, tau=tau)).plan(ctx), ctx)
        assert bool(mask[:, :, 0].all()) and bool(mask[place, :, place].all())
        assert bool(mask[place, :, place // B * B].all())
        later = context(full.q[250:], full.keys(), tok[250:], place[250:])
        assert FlexPrefill(replace(SMALL, tau=tau)).plan(later) is not None


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ("gamma=0", "gamma=1.5", "tau=-1", "min_budget=0", "max_budget=500", "block=100", "slash_cover=all"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            make_parts([Method.parse(f"flexprefill:{wrong}")])
    assert classes("flexprefill") == {"attention": FlexPrefill}
    (part,) = make_parts([Method.parse("flexprefill:max_budget=none,gamma=0.95")])
    assert part.config == FlexPrefillConfig(gamma=0.95) and part.capability.digests == ("mean_k",)
