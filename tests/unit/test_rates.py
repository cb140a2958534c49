"""Slices of a pass's attention: as much work each, whatever a layer's plan and model let its rows read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from firstlight.attention.minference import MInference, MInferenceConfig
from firstlight.attention.patterns import BLOCKS, LINES, Pattern
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.engine.rates import Rate, attend_work, slices
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK, KVLayout
from tests.unit.planted import DIM, HEADS, KV_HEADS, seen, some

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, ENDS = 1200, [1, 17, 256, 500, 1199, 1200]


def sparse(ctx: PlanContext, *patterns: Pattern) -> AttnPlan:
    planner = MInference(MInferenceConfig())
    planner.patterns = [[patterns[h % len(patterns)] for h in range(HEADS)]]
    plan = planner.plan(ctx)
    assert plan is not None
    return plan


def call(ctx: PlanContext, plan: AttnPlan | None, window: int | None = None) -> AttnCall:
    rows = AttnRows([0, len(ctx.tok)], ctx.tok, ctx.pos, [False])
    end = int(ctx.tok[-1]) + 1
    view = KVView(torch.zeros(KV_HEADS, -(-end // BLOCK), dtype=torch.int32), [end] * KV_HEADS, None, None)
    layout = KVLayout(1, DIM, ctx.q.dtype)
    return AttnCall(ctx.q, rows, layout, [view], ctx.q, ctx.scale, plan, model_window=window)


@pytest.mark.parametrize("patterns", [(Pattern(LINES, 0.1, 0.2),), (Pattern(BLOCKS, 3), Pattern(LINES, 0.02, 0.05))])
@pytest.mark.parametrize("first", [0, 64, 137])
def test_work_is_what_a_plan_lists(patterns: tuple[Pattern, ...], first: int) -> None:
    """Whole blocks, the diagonal one as well: a kernel takes them so."""
    ctx = some(5, first, first + ROWS)
    plan = sparse(ctx, *patterns)
    each = seen(plan, ctx).sum((1, 2)) + HEADS * (BLOCK - 1 - ctx.tok % BLOCK)
    found = attend_work(call(ctx, plan), ENDS)
    assert [end for end, _ in found] == ENDS
    want = [float(each[lo:hi].sum()) * 4 * DIM for lo, hi in pairwise([0, *ENDS])]
    assert [work for _, work in found] == pytest.approx(want)


def test_work_without_a_plan_is_what_lies_before_each_row_and_in_its_window() -> None:
    ctx = some(5, 0, ROWS)
    for window in (None, 300):
        each = (ctx.tok + 1).clamp(max=window or ROWS) * HEADS * 4 * DIM
        found = attend_work(call(ctx, None, window), ENDS)
        assert [work for _, work in found] == [float(each[lo:hi].sum()) for lo, hi in pairwise([0, *ENDS])]


def test_a_sparse_plan_has_fewer_slices() -> None:
    """In proportion to what it reads: a call has its price."""
    ctx = some(5, 0, ROWS)
    ends, rate = list(range(24, ROWS + 24, 24)), Rate(1e9)
    counts = []
    for plan in (None, sparse(ctx, Pattern(LINES, 0.02, 0.05))):
        work = attend_work(call(ctx, plan), ends)
        counts.append(len(list(slices(work, rate))))
        assert sum(w for _, _, w in slices(work, rate)) == pytest.approx(sum(w for _, w in work))
    dense, few = counts
    share = (seen(sparse(ctx, Pattern(LINES, 0.02, 0.05)), ctx).sum() / (HEADS * ROWS * (ROWS + 1) / 2)).item()
    assert dense > 20 and few < 1.5 * share * dense + 1
