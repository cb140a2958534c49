"""`xattention`: its scores against plain sums, its sets against plain rules, and what it can't see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from firstlight.attention.grid import Grid
from firstlight.attention.xattention import XAttention, XAttentionConfig, block_mass, cover
from firstlight.core.attn import PlanContext
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.train.xattention import Config as Calibrating
from firstlight.train.xattention import of_blocks, shares
from tests.plans import context, seen, some_qk

B, S = 16, 4


def mass_of(ctx: PlanContext, stride: int = S, alternating: bool = False) -> Tensor:
    return block_mass(ctx, Grid(ctx, B, B), stride, alternating)


def plainly(q: Tensor, k: Tensor, rows: range, stride: int, alternating: bool = False) -> Tensor:
    """The same, pair by pair: queries of other rows than `rows` don't exist."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    first, tiles, blocks = rows[0] // B, rows[-1] // B - rows[0] // B + 1, -(-(rows[-1] + 1) // B)
    mass = torch.zeros(heads, tiles, blocks)
    for h in range(heads):
        for m in range(rows[0] // stride, rows[-1] // stride + 1):
            there = [t for t in range(m * stride, (m + 1) * stride) if t in rows]
            logits = []
            for n in range(m + 1):
                total = 0.0
                for t in there:
                    odd = alternating and n % 2 == 1
                    j = n * stride + (stride - (2 if odd else 1) - t % stride) % stride
                    if j <= rows[-1]:
                        total += float(q[t, h] @ k[j, h // group]) / math.sqrt(q.shape[2])
                logits.append(total / len(there))
            for n, share in enumerate(torch.tensor(logits).softmax(0)):
                mass[h, m * stride // B - first, n * stride // B] += share
    return mass


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("rows", [range(0, 64), range(37, 75), range(21, 22)])
def test_scores_are_means_over_antidiagonals(rows: range, alternating: bool) -> None:
    q, k = some_qk(80)
    made = mass_of(context(q, k, rows), alternating=alternating)
    torch.testing.assert_close(made, plainly(q, k, rows, S, alternating), rtol=1e-4, atol=1e-5)


def test_a_stride_of_one_is_the_mass_of_dense_attention() -> None:
    q, k = some_qk(70)
    scores = torch.einsum("thd,jhd->htj", q, k.repeat_interleave(3, 1)) / math.sqrt(8)
    dense = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).softmax(-1)
    blocks = torch.nn.functional.pad(dense, (0, 10, 0, 10)).view(6, 5, B, 5, B).sum((2, 4))
    torch.testing.assert_close(mass_of(context(q, k, range(70)), 1), blocks)


def test_full_rows_of_blocks_sum_to_their_cells() -> None:
    q, k = some_qk(96)
    assert torch.allclose(mass_of(context(q, k, range(96))).sum(-1), torch.tensor(B / S))


def planted(hot: Tensor, dim: int = 256) -> PlanContext:
    """One head whose logit is 40 where bool `hot` [N, N] says so, 0 elsewhere."""
    k = torch.eye(dim)[: len(hot)]
    q = torch.nn.functional.pad(hot.float() * 40 * math.sqrt(dim), (0, dim - len(hot)))
    return context(q[:, None], k[:, None], range(len(hot)))


@pytest.mark.parametrize("column", range(32, 32 + S))
def test_a_column_is_found_at_every_residue(column: int) -> None:
    hot = torch.zeros(128, 128, dtype=torch.bool)
    hot[:, column] = True
    ctx = planted(hot)
    mass = mass_of(ctx)[0]
    assert (mass[3:].argmax(-1) == column // B).all()
    made = XAttention(XAttentionConfig(tau=0.9, stride=S, block=B)).plan(ctx)
    assert made is not None and seen(made, ctx)[column:, 0, column].all()


def test_by_hand_a_tile_reads_the_block_that_it_looks_at() -> None:
    """Four tiles of 16. The last one's rows look at key 20; the third one finds 0.62 in its forced blocks."""
    hot = torch.zeros(64, 64, dtype=torch.bool)
    hot[48:, 20] = True
    ctx = planted(hot)
    shown = seen(XAttention(XAttentionConfig(tau=0.5, stride=S, block=B)).plan(ctx), ctx)[:, 0]
    lists = [row.nonzero()[:, 0].div(B, rounding_mode="floor").unique().tolist() for row in shown[B - 1 :: B]]
    assert lists == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert shown[50].nonzero()[:, 0].tolist() == [*range(32), 48, 49, 50]


def test_an_even_diagonal_is_invisible_to_an_even_stride_unless_cells_alternate() -> None:
    row, entry = torch.arange(128)[:, None], torch.arange(128)
    for distance in (32, 33, 48, 49):
        ctx = planted(row - entry == distance)
        shares = mass_of(ctx)[0, 5]
        found = shares[(5 * B - distance) // B] + shares[(6 * B - 1 - distance) // B]
        if distance % 2:
            assert found > 0.9 * shares.sum()
        else:  # exactly uniform: every cell up to a row's own has the same share
            cells = torch.arange(5 * B // S, 6 * B // S)
            want = torch.stack([(1 / (cells + 1)).sum() * B / S] * 5)
            torch.testing.assert_close(shares[:5], want)
        both = mass_of(ctx, alternating=True)[0, 5]
        assert both[[(5 * B - distance) // B, (6 * B - 1 - distance) // B]].max() > 3 * both.median()


def test_a_lone_pair_off_the_antidiagonal_is_missed() -> None:
    pairs = {(100, 20): False, (100, 23): True}  # i + j = S - 1 only for the second
    for (row, entry), found in pairs.items():
        hot = torch.zeros(128, 128, dtype=torch.bool)
        hot[row, entry] = True
        mass = mass_of(planted(hot))[0, row // B]
        assert (float(mass[entry // B]) > 0.9) == found


def test_cover_is_the_smallest_set_and_ties_go_to_the_first() -> None:
    mass = torch.tensor([[[0.1, 0.3, 0.3, 0.2, 0.1, 0.0]]])
    forced = torch.tensor([[True, False, False, False, True, False]])

    def chosen(tau: float) -> list[int]:
        return cover(mass, forced, torch.tensor([tau]))[0, 0].nonzero()[:, 0].tolist()

    assert chosen(0.0) == chosen(0.19) == [0, 4]
    assert chosen(0.21) == chosen(0.49) == [0, 1, 4] and chosen(0.51) == [0, 1, 2, 4]
    assert chosen(0.9) == [0, 1, 2, 3, 4] and chosen(1.0) == [0, 1, 2, 3, 4, 5]


def test_every_row_reads_the_first_block_its_own_and_more_with_tau() -> None:
    q, k = some_qk(200)
    q = q * 3
    ctx = context(q, k, range(70, 200))
    before = torch.zeros(130, 6, 200, dtype=torch.bool)
    for tau in (0.0, 0.3, 0.6, 0.9, 0.99):
        made = XAttention(XAttentionConfig(tau=tau, stride=S, block=B)).plan(ctx)
        now = seen(made, ctx)
        own = torch.arange(200) // B == (ctx.tok // B)[:, None]
        must = ((torch.arange(200) < B) | own) & (torch.arange(200) <= ctx.tok[:, None])
        assert (now | ~must[:, None]).all() and (now | ~before).all()
        if tau == 0:
            assert torch.equal(now, must[:, None].expand_as(now))
        before = now
    assert before.float().mean() > 0.4
    assert XAttention(XAttentionConfig(tau=1.0, block=B)).plan(ctx) is None
    assert XAttention(XAttentionConfig(tau=0.5)).plan(context(q, k, range(200))) is None  # only forced blocks


def test_chunks_of_whole_cells_have_the_same_scores() -> None:
    q, k = some_qk(160)
    whole = mass_of(context(q, k, range(160)))
    summed = torch.zeros_like(whole)
    for lo, hi in ((0, 20), (20, 68), (68, 160)):
        part = mass_of(context(q, k, range(lo, hi)))
        summed[:, lo // B : lo // B + part.shape[1], : part.shape[2]] += part
    torch.testing.assert_close(summed, whole)
    xattention = XAttention(XAttentionConfig(tau=0.7, stride=S, block=B))
    want = seen(xattention.plan(context(q, k, range(160))), context(q, k, range(160)))
    for lo, hi in ((0, 48), (48, 160)):  # and of whole blocks the same lists
        ctx = context(q, k, range(lo, hi))
        assert torch.equal(seen(xattention.plan(ctx), ctx), want[lo:hi, :, :hi])


def test_missing_rows_and_entries_do_no_harm() -> None:
    q, k = some_qk(200)
    rows = torch.tensor([*range(3, 30), 33, *range(130, 190)])  # tiles 3 to 7 have no row
    ctx = context(q, k, rows, place=torch.arange(10, 10 + len(rows)))
    mass = mass_of(ctx)
    assert mass.isfinite().all() and (mass.sum(-1)[:, 3:8] == 0).all()
    assert XAttention(XAttentionConfig(tau=0.5, stride=S, block=B)).plan(ctx) is not None


FACTS = ModelFacts("m", 2, 6, 2, 8, (None, None))


def test_calibrated_shares_are_used_for_their_stride_and_block_only() -> None:
    values = {"stride": S, "block": B, "tau": [[0.1] * 6, [0.2, 1.0, 0.3, 0.4, 0.5, 0.6]]}
    found = Calibration("xattention", "m", {}, {}, values, "file")
    for given, want in (({}, 0.2), ({"tau": 0.7}, 0.7), ({"stride": 8}, 0.9), ({"alternating": True}, 0.9)):
        part = XAttention(XAttentionConfig(**({"stride": S, "block": B} | given)))  # type: ignore[arg-type]
        part.bind(FACTS, found)
        assert float(part.tau(1, 6)[0]) == pytest.approx(want)
    with pytest.raises(UserError, match="no tau for each head"):
        XAttention(XAttentionConfig(stride=S, block=B)).bind(ModelFacts("m", 2, 8, 2, 8, (None, None)), found)
    q, k = some_qk(200)
    part = XAttention(XAttentionConfig(stride=S, block=B))
    part.bind(FACTS, found)
    ctx = context(q, k, range(200), layer=1)
    shares = seen(part.plan(ctx), ctx).sum((0, 2)).tolist()
    assert shares[1] == 200 * 201 // 2 and shares[0] < shares[2] < shares[5] < shares[1]


@pytest.mark.parametrize(
    ("given", "said"), [({"tau": 1.5}, "tau=1.5"), ({"block": 96}, "block=96"), ({"stride": 12}, "stride=12")]
)
def test_bad_values_name_themselves(given: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        XAttentionConfig(**given)  # type: ignore[arg-type]


def test_calibration_finds_the_least_share_that_holds_enough() -> None:
    heads, prompts, tiles = 3, 2, 6
    generator = torch.Generator().manual_seed(3)
    causal = torch.ones(tiles, tiles).tril()
    mass = torch.rand(heads, prompts * tiles, tiles, generator=generator) ** 4 * causal.repeat(prompts, 1)
    mass = mass / mass.sum(-1, keepdim=True)
    scores = mass.sqrt()  # the same order, another sharpness
    scores[2] = 1.0 * causal.repeat(prompts, 1)  # a head whose scores say nothing
    tau, density = shares(scores, mass, prompts, 0.8)
    block, tile = torch.arange(tiles), torch.arange(tiles)[:, None].repeat(prompts, 1)
    forced = (block == 0) | (block == tile)
    choice = tile[:, 0] >= 2  # before that everything is forced

    def held(share: Tensor) -> Tensor:
        return (mass * cover(scores, forced, share)).sum(-1)[:, choice].mean(-1)

    assert (held(tau) >= 0.8).all() and (held((tau - 0.01).clamp(min=0)) < 0.8)[tau > 0.01].all()
    assert tau[2] > tau[:2].max() and 0.3 < density < 1


def test_a_calibration_compares_scores_with_dense_attention() -> None:
    q, k = some_qk(4 * B)
    scores, mass = of_blocks(q, k, 8**-0.5, Calibrating(stride=1, block=B, length=4 * B))
    torch.testing.assert_close(scores / B, mass)  # at stride 1 they are the same
