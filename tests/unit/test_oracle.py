"""`oracle`: its sets against plain ones, and that nobody with the same budget holds more attention mass."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from firstlight.attention.band import Band, BandConfig
from firstlight.attention.flexprefill import FlexPrefill, FlexPrefillConfig
from firstlight.attention.grid import mask_of
from firstlight.attention.minference import MInference, MInferenceConfig
from firstlight.attention.oracle import BLOCKS, HEADS, POOLS, ROWS, Oracle, OracleConfig, attention_mass
from firstlight.attention.random import Random, RandomConfig
from firstlight.attention.trishape import TriShape, TriShapeConfig
from firstlight.attention.xattention import XAttention, XAttentionConfig
from firstlight.core.attn import PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from tests.plans import context, seen, some_qk
from tests.unit.test_compactattention import mean_k

N, G = 150, 3
Q, K = some_qk(N)
Q = Q * 2


def dense(q: Tensor = Q, k: Tensor = K) -> Tensor:
    """f64 [N, Hq, N]."""
    scores = torch.einsum("thd,jhd->thj", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1))
    ahead = torch.ones(len(q), len(q)).triu(1).bool()[:, None]
    return (scores / math.sqrt(q.shape[2])).masked_fill(ahead, -torch.inf).softmax(-1)


def shown(of: range = range(N), **settings: object) -> Tensor:
    """bool [rows, Hq, entries]."""
    ctx = context(Q, K, of)
    return seen(Oracle(OracleConfig(**settings)).plan(ctx), ctx)  # type: ignore[arg-type]


def plainly(rows: range, k: int, share: int, block: int, heads: str, pool: str) -> Tensor:
    """The same, list by list: sort what is left of the mass, the earlier of equals first."""
    mass, unit = dense(), {"layer": 6, "group": G, "head": 1}[heads]
    out = torch.zeros(len(rows), 6, rows[-1] + 1, dtype=torch.bool)
    for i, t in enumerate(rows):
        tile = [r for r in rows if r // share == t // share]
        for h in range(6):
            sharing = [g for g in range(6) if g // unit == h // unit]
            own = mass[tile][:, sharing, : tile[-1] + 1].mean(1)
            pooled = own.mean(0) if pool == "mean" else own.amax(0)
            sums = [float(pooled[b : b + block].sum()) for b in range(0, len(pooled), block)]
            for number in sorted(range(len(sums)), key=lambda n: (-sums[n], n))[: k // block]:
                out[i, h, number * block : (number + 1) * block] = True
        if share > 1:
            out[i, :, [0, t]] = True
        out[i, :, t + 1 :] = False
    return out


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (range(N), (20, 1, 1, "layer", "mean")),
        (range(37, 110), (20, 1, 1, "head", "mean")),
        (range(37, 110), (32, 16, 1, "group", "mean")),
        (range(37, 110), (32, 16, 16, "head", "max")),
        (range(37, 110), (48, 1, 16, "layer", "mean")),
        (range(5, N), (64, 64, 64, "group", "mean")),
    ],
)
def test_lists_are_the_best_by_mass(rows: range, settings: tuple[int, int, int, str, str]) -> None:
    k, share, block, heads, pool = settings
    made = shown(rows, k=k, rows=share, block=block, heads=heads, pool=pool)
    assert torch.equal(made, plainly(rows, *settings))


def test_a_row_has_k_entries_and_equal_ones_are_taken_in_order() -> None:
    assert torch.equal(shown(k=20).sum(-1), torch.arange(1, N + 1).clamp(max=20)[:, None].expand(-1, 6))
    ctx = context(Q * 0, K, range(N))
    made = seen(Oracle(OracleConfig(k=20)).plan(ctx), ctx)
    assert torch.equal(made[:, 0], torch.ones(N, N).tril().bool() & (torch.arange(N) < 20))


def test_as_many_as_there_are_is_dense() -> None:
    for given in ({}, {"rows": 16}, {"block": 16, "heads": "head"}):
        config = OracleConfig(k=N, **given)  # type: ignore[arg-type]
        assert Oracle(config).plan(context(Q, K, range(20, 60))) is None


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", ROWS)
def test_as_many_as_there_are_show_all(rows: int, heads: str) -> None:
    """Where more of the prompt is to come, lists are made, and they hold everything."""
    ctx = context(Q, K, range(90, N), prompt_len=1000)
    before = (torch.arange(N) <= ctx.tok[:, None])[:, None]
    for block, pool in itertools.product(BLOCKS, POOLS):
        plan = Oracle(OracleConfig(256, rows, block, heads, pool)).plan(ctx)
        assert plan is not None and torch.equal(seen(plan, ctx), before.expand(-1, 6, -1))


@pytest.mark.parametrize("heads", HEADS)
def test_mass_is_that_of_dense_attention_and_sums_to_one(heads: str) -> None:
    mass = attention_mass(context(Q, K, range(40, N)), slice(10, 60), heads)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    lists = {"layer": 1, "group": 2, "head": 6}[heads]
    of_lists = dense()[50:100].unflatten(1, (lists, -1)).mean(2).transpose(0, 1)
    torch.testing.assert_close(mass, of_lists[..., : mass.shape[2]])


def recall(see: Tensor) -> float:
    """Mean mass held."""
    return float((dense() * see).sum(-1).mean())


def test_more_entries_hold_more_and_sharing_holds_less() -> None:
    by_k = [recall(shown(k=k)) for k in (1, 8, 32, 100)]
    assert by_k == sorted(by_k) and by_k[0] < by_k[-1]
    by_heads = [recall(shown(k=16, heads=heads)) for heads in ("layer", "group", "head")]
    assert by_heads == sorted(by_heads) and by_heads[0] < by_heads[-1]
    by_rows = [recall(shown(k=32, rows=rows, block=block)) for rows, block in ((1, 1), (1, 16), (64, 16))]
    assert by_rows == sorted(by_rows, reverse=True)


LONG_Q, LONG_K = some_qk(300, dim=16)
LATE = range(200, 300)
FACTS = ModelFacts("", 1, 6, 2, 16, (None,))
SOME_PLANNERS: list[Planner] = [
    Band(BandConfig(sink=4, window=40)),
    Random(RandomConfig(density=0.4, block=16)),
    XAttention(XAttentionConfig(tau=0.6, stride=1, block=16)),
    FlexPrefill(FlexPrefillConfig(gamma=0.4, min_budget=64, block=64)),
    MInference(MInferenceConfig(vertical=40.0, slash=60.0, exact=True)),
    TriShape(TriShapeConfig(sink=4, window=40, tail=20)),
]


@pytest.fixture(scope="module")
def most() -> Tensor:
    """f64 [301, rows, Hq]: the mass that the oracle holds with so many entries for each row and head."""
    ctx, mass = context(LONG_Q, LONG_K, LATE), dense(LONG_Q, LONG_K)[LATE[0] :]
    held = [torch.zeros(len(LATE), 6).double()]
    for k in range(1, 300):
        plan = Oracle(OracleConfig(k=k, heads="head")).plan(ctx)
        assert plan is not None
        lists = mask_of(plan.col_ptr, plan.col_idx, len(LATE) * 6, 300)
        held.append((mass * lists.view_as(mass)).sum(-1))
    return torch.stack([*held, mass.sum(-1)])


@pytest.mark.parametrize("planner", SOME_PLANNERS, ids=lambda planner: planner.name)
def test_nobody_holds_more_with_as_much(planner: Planner, most: Tensor) -> None:
    planner.bind(FACTS, None)
    means = mean_k(LONG_K.transpose(0, 1))
    ctx = context(LONG_Q, LONG_K, LATE, digest=means)
    see = seen(planner.plan(ctx), ctx)
    held = (dense(LONG_Q, LONG_K)[LATE[0] :] * see).sum(-1)
    count = see.sum(-1)
    assert bool((count > 0).all()) and int(count.sum()) < 0.9 * 6 * sum(t + 1 for t in LATE)
    assert bool((held <= most.gather(0, count[None])[0] + 1e-9).all())


def test_dice_hold_much_less() -> None:
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(N, 6, N, generator=generator).masked_fill(torch.ones(N, N).triu(1).bool()[:, None], -1)
    fixed = chance.topk(20, -1).indices
    see = torch.zeros(N, 6, N, dtype=torch.bool).scatter_(-1, fixed, True) & (chance >= 0)
    assert recall(see) < 0.8 * recall(shown(k=20, heads="head"))


def test_two_heads_that_look_apart_lose_half_of_what_they_share() -> None:
    q, k = torch.zeros(64, 2, 64), torch.eye(64)[:, None].repeat(1, 2, 1)
    q[63, 0, :8], q[63, 1, 8:16] = 200.0, 200.0
    ctx = context(q, k, range(64))
    mass = dense(q, k)[63]
    for heads, held in (("layer", 0.5), ("head", 1.0)):
        see = seen(Oracle(OracleConfig(k=8, heads=heads)).plan(ctx), ctx)[63]
        assert float((mass * see).sum(-1).mean()) == pytest.approx(held, abs=1e-6)


def test_a_row_of_its_own_list_knows_no_chunks() -> None:
    whole = shown(k=20, heads="group")
    for lo, hi in ((0, 1), (1, 38), (38, N)):
        assert torch.equal(shown(range(lo, hi), k=20, heads="group"), whole[lo:hi, :, :hi])
    assert Oracle(OracleConfig()).capability.chunk_invariant and Oracle(OracleConfig()).capability.prefix_stable
    shared = Oracle(OracleConfig(rows=16)).capability
    assert not shared.chunk_invariant and not shared.prefix_stable
    assert not shared.looks and Oracle(OracleConfig()).operations(_some_context()) == 0  # no clock switches it off


def _some_context() -> PlanContext:
    return context(Q, K, range(40))


@pytest.mark.parametrize("share", [1, 16])
def test_missing_rows_and_entries_do_no_harm(share: int) -> None:
    rows = torch.tensor([*range(3, 10), *range(140, N), *range(600, 620)])  # a strip of 128 rows has few, one has none
    q, k = some_qk(700)
    there = torch.cat([torch.tensor([0, 2]), rows])
    ctx = replace(context(q, k, rows, place=torch.arange(2, len(there))), keys=lambda: k[there].transpose(0, 1))
    plan = Oracle(OracleConfig(k=8, rows=share)).plan(ctx)
    assert plan is not None and plan.col_ptr is not None and len(plan.col_ptr) == len(plan.band) + 1
    taken = seen(plan, ctx, there)
    assert taken.shape[2] == len(there) and taken.any(-1).all()
    if share == 1:
        assert torch.equal(taken.sum(-1), torch.arange(3, len(there) + 1).clamp(max=8)[:, None].expand(-1, 6))


@pytest.mark.parametrize(
    ("given", "said"), [({"rows": 3}, "rows=3"), ({"heads": "all"}, "heads=all"), ({"k": 8, "block": 16}, "k=8")]
)
def test_bad_values_name_themselves(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OracleConfig(**given)  # type: ignore[arg-type]
