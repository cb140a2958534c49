"""Rows that skip blocks of low scores: the reference against a walk by hand, every backend against it, and bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from answers import (
    BF16,
    F32,
    assert_agrees,
    assert_same_bits,
    each_backend,
    each_blocks,
    judge,
    run,
    threads,
)
from cases import LONG, Req, Spec, alone, build, chunk, few, fresh, reqs, slots_of, specs, up_to
from hypothesis import given
from hypothesis import strategies as st

from firstlight.kernels.contract import AttnCall
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.reference.attention import scores
from firstlight.kernels.skipping import gaps, highest

SCANS = (0, 1, 2)
PLANS = st.sampled_from(["full", "bands", "blocks", "columns", "mixed"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def skipping(spec: Spec, scan: int, share: float) -> AttnCall:
    """The spec's call where each head of each request skips about that share of what lies below the best so far.

    Thresholds lie in the widest gap around, so that rounding decides nothing.
    """
    call = build(spec)
    assert call.plan is not None
    below = torch.full((len(call.kv), call.q.shape[1]), -0.5)
    for b, view in enumerate(call.kv):
        for h in range(len(view.length)):
            _, score = scores(call, b, h, *call.rows.row_ptr[b : b + 2])
            for g, gap in enumerate(gaps(highest(score), scan).unbind(1)):
                found = gap[(gap < 0) & (gap > -math.inf)].sort().values
                if len(found) > 1:
                    middle = round(share * (len(found) - 2))
                    low = max(0, middle - len(found) // 10)
                    at = low + int(found[low : middle + len(found) // 10 + 2].diff().argmax())
                    below[b, h * score.shape[1] + g] = found[at : at + 2].mean()
    return replace(call, plan=replace(call.plan, skip_log=below, scan=scan))


def with_threshold(call: AttnCall, below: float, scan: int = 0) -> AttnCall:
    assert call.plan is not None
    skip = torch.full((len(call.kv), call.q.shape[1]), below)
    return replace(call, plan=replace(call.plan, skip_log=skip, scan=scan))


def by_hand(call: AttnCall) -> AttnCall:
    """Block after block, as a row meets them; what is dropped weighs no more than lambda an entry."""
    call, plan = fresh(call, F32), call.plan
    assert plan is not None and plan.skip_log is not None and call.lse is not None
    call.out.zero_()
    for b, view in enumerate(call.kv):
        lo, hi = call.rows.row_ptr[b : b + 2]
        call.stats.dense += int((call.rows.tok[lo:hi] + 1).sum()) * call.q.shape[1]
        for h, n in enumerate(view.length):
            seen, score = scores(call, b, h, lo, hi)
            _, v = call.layout.read(slots_of(view, h))
            blocks = list(range(-(-n // BLOCK)))
            met = {0: blocks, 1: blocks[::-1], 2: blocks[:1] + blocks[:0:-1]}[plan.scan]
            for row in range(hi - lo):
                for g in range(seen.shape[1]):
                    head = h * seen.shape[1] + g
                    mine, below = score[row, g], float(plan.skip_log[b, head])
                    best, keep = -math.inf, torch.zeros(n, dtype=torch.bool)
                    for block in met:
                        entries = slice(block * BLOCK, (block + 1) * BLOCK)
                        high = float(mine[entries].max())
                        if high > -math.inf and (best == -math.inf or high - best >= below):
                            keep[entries] = seen[row, g, entries]
                        best = max(best, high)
                    weight = mine[keep].exp()
                    call.lse[lo + row, head] = weight.sum().log()
                    if keep.any():
                        call.out[lo + row, head] = weight @ v[keep].double() / weight.sum()
                        dropped, count = mine[seen[row, g] & ~keep].exp().sum(), int((seen[row, g] & ~keep).sum())
                        assert float(dropped) <= math.exp(below) * count * float(weight.sum()) * (1 + 1e-9)
                    call.stats.visible += int(keep.sum())
    return call


@few(20)
@given(spec=specs(reqs(max_rows=5), dim=4, probe_rows=0, plan="mixed"), scan=st.sampled_from(SCANS), plan=PLANS)
def test_reference_is_the_walk_by_hand(spec: Spec, scan: int, plan: str) -> None:
    call = skipping(replace(spec, plan=plan), scan, 0.6)
    assert_agrees(judge(call), by_hand(call))


@each_backend
@few(30)
@given(
    spec=specs(reqs(), plan="full", int8=st.booleans()),
    plan=PLANS,
    scan=st.sampled_from(SCANS),
    share=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_agrees_on_anything(name: str, spec: Spec, plan: str, scan: int, share: float) -> None:
    call = skipping(replace(spec, plan=plan), scan, share)
    assert_agrees(run(name, call), judge(call))


@each_backend
@pytest.mark.parametrize(("dtype", "int8"), [(F32, False), (BF16, False), (F32, True)])
@pytest.mark.parametrize("scan", SCANS)
def test_agrees_on_long_views(name: str, dtype: torch.dtype, int8: bool, scan: int) -> None:
    """With int8 blocks rows are float32: rounded to bfloat16 they would be near a threshold on either side."""
    spec = Spec(dim=64, dtype=dtype, int8=int8, reqs=LONG, plan="full", scope="group", probe_rows=8)
    call = skipping(spec, scan, 0.7)
    got, want = run(name, call), judge(call)
    assert_agrees(got, want)
    assert got.stats.visible < 0.8 * judge(replace(call, plan=None)).stats.visible


@each_backend
@pytest.mark.parametrize(
    ("dtype", "int8", "scan"), [*((dtype, False, scan) for dtype in (F32, BF16) for scan in SCANS), (BF16, True, 1)]
)
@pytest.mark.parametrize("plan", ["full", "mixed"])
def test_a_rows_bits_are_its_own(name: str, dtype: torch.dtype, int8: bool, scan: int, plan: str) -> None:
    """Whatever slice, chunk, batch and threads it is computed with."""
    batch = (Req(1000, 60), Req(1100, 1, decode=True), Req(600, 20, dropped=0.2, gaps=True, ahead=30))
    call = skipping(Spec(dtype=dtype, int8=int8, reqs=batch, plan=plan, probe_rows=8), scan, 0.6)
    whole = run(name, call)
    assert_same_bits(run(name, call, (7, 40, 61)), whole)
    with threads(2):
        assert_same_bits(run(name, call), whole)
    singles = [run(name, alone(call, b)) for b in range(3)]
    assert torch.equal(whole.out, torch.cat([s.out for s in singles]))
    for lo, hi in ((0, 1), (1, 25), (25, 60)):
        got = run(name, chunk(call, 0, lo, hi, up_to(call.kv[0], int(call.rows.tok[hi - 1]))))
        assert torch.equal(got.out, whole.out[lo:hi]) and torch.equal(got.lse, whole.lse[lo:hi])


@each_backend
@each_blocks
def test_no_threshold_or_a_far_one_changes_no_bit(name: str, dtype: torch.dtype, int8: bool) -> None:
    for plan, below in (("mixed", -math.inf), ("full", -1e30), ("blocks", -1e30)):
        call = build(Spec(dtype=dtype, int8=int8, reqs=LONG, plan=plan, probe_rows=8))
        assert_same_bits(run(name, with_threshold(call, below, 2 if below == -math.inf else 0)), run(name, call))


@each_backend
@pytest.mark.parametrize("scan", SCANS)
def test_higher_thresholds_skip_more_and_never_all(name: str, scan: int) -> None:
    call = build(Spec(dim=64, reqs=LONG, plan="full", scope="group"))
    read = [run(name, with_threshold(call, below, scan)) for below in (-math.inf, -2.0, -1.0, -0.5, -0.1, -1e-6)]
    seen = [each.stats.visible for each in read]
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.5 * seen[0]
    assert all(bool(torch.isfinite(each.out).all() and torch.isfinite(each.lse).all()) for each in read)


def peaked(kind: str) -> AttnCall:
    """One row of a single head over 1,280 entries whose scores rise, or fall after the first block, or are alike."""
    call = build(Spec(dim=16, kv_heads=1, group=1, reqs=(Req(1279, 1),), plan="full", scope="layer"))
    score = {"rising": torch.arange(1280) / 64.0, "spike": torch.zeros(1280), "equal": torch.zeros(1280)}[kind]
    score[3] = 50.0 if kind == "spike" else score[3]
    keys = torch.zeros(1280, 1, 16)
    keys[:, 0, 0] = score
    call.q[:] = torch.nn.functional.pad(torch.full((1, 1, 1), 1 / call.scale), (0, 15))
    slots = slots_of(call.kv[0], 0)
    _, values = call.layout.read(slots)
    call.layout.write(slots[:, None], keys, values[:, None])
    return call


@each_backend
@pytest.mark.parametrize(("kind", "kept"), [("rising", (20, 1, 2)), ("spike", (1, 20, 1)), ("equal", (20, 20, 20))])
def test_order_decides_what_is_met_late(name: str, kind: str, kept: tuple[int, ...]) -> None:
    for scan in SCANS:
        call = with_threshold(peaked(kind), math.log(0.9), scan)
        got = run(name, call)
        assert got.stats.visible == kept[scan] * BLOCK
        assert_agrees(got, judge(call))
