"""Attention: the reference against the words of the contract, every other backend against the reference."""

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
    backend,
    each_backend,
    each_blocks,
    each_dtype,
    judge,
    run,
    sums,
    threads,
)
from cases import LONG, Req, Spec, build, few, fresh, reqs, slots_of, specs
from hypothesis import given
from hypothesis import strategies as st

from firstlight.kernels.contract import AttnCall
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.reference.attention import visible_mask

GROUPS_AND_DIMS = [(1, 64), (2, 128), (2, 96), (3, 64), (4, 256), (6, 128), (7, 64), (8, 64)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


# --- the reference means what the contract says -----------------------------------------------------------------------


def sees(call: AttnCall, b: int, h: int, head: int, row: int) -> list[int]:
    """The entries that one row of one query head sees, one by one."""
    view, plan = call.kv[b], call.plan
    t, p = int(call.rows.tok[row]), int(call.rows.pos[row])
    numbers = range(view.length[h])
    tok = list(numbers) if view.tok is None else view.tok[h].tolist()
    pos = list(numbers) if view.pos is None else view.pos[h].tolist()
    seen = [j for j in numbers if tok[j] <= t and (view.visible is None or view.visible[h, j])]
    if call.model_window is not None:
        seen = [j for j in seen if p - pos[j] < call.model_window]
    if plan is None:
        return seen
    tile = t // plan.q_tile - int(plan.tile_first[b])
    line = int(plan.tile_map[plan.tile_base[b] + tile]) * plan.num_lists + int(plan.head_map[head])
    sink, window = plan.band[line].tolist()
    blocks, columns = (
        set() if ptr is None else set(idx[ptr[line] : ptr[line + 1]].tolist())
        for ptr, idx in ((plan.blk_ptr, plan.blk_idx), (plan.col_ptr, plan.col_idx))
    )
    near = [window == -1 or (window > 0 and p - x < window) for x in pos]
    return [j for j in seen if j < sink or near[j] or j // plan.blk in blocks or j in columns]


def by_hand(call: AttnCall) -> AttnCall:
    """Attention row by row, over the entries that each row sees and no others."""
    call = fresh(call, F32)
    call.out.zero_()
    group = call.q.shape[1] // len(call.kv[0].length)
    for b, view in enumerate(call.kv):
        for row in range(call.rows.row_ptr[b], call.rows.row_ptr[b + 1]):
            for head in range(call.q.shape[1]):
                h = head // group
                seen = sees(call, b, h, head, row)
                k, v = (x.double() for x in call.layout.read(slots_of(view, h)[seen]))
                score = k @ call.q[row, head].double() * call.scale
                cap = call.score_cap
                weight = torch.exp(score if cap is None else cap * torch.tanh(score / cap))
                total = weight.sum()
                call.lse[row, head] = total.log()
                if seen:
                    call.out[row, head] = weight @ v / total
                if seen and call.probe is not None and call.rows.tok[row] >= call.probe.first_tok[b]:
                    call.probe.colsum[b][h, seen] += (weight / total).float()
                call.stats.dense += int(call.rows.tok[row]) + 1
                call.stats.visible += len(seen)
    return call


@few(30)
@given(specs(reqs(max_rows=5, max_first=60), dim=4))
def test_reference_is_the_contract(spec: Spec) -> None:
    call = build(spec)
    assert_agrees(judge(call), by_hand(call))


# --- every backend gives the reference's answer -----------------------------------------------------------------------


@each_backend
@few(80)
@given(spec=specs(reqs(), int8=st.booleans()))
def test_agrees_on_anything(name: str, spec: Spec) -> None:
    call = build(spec)
    assert_agrees(run(name, call), judge(call))


@each_backend
@each_blocks
@pytest.mark.parametrize("plan", ["none", "mixed"])
@pytest.mark.parametrize(("group", "dim"), GROUPS_AND_DIMS)
def test_agrees_on_heads(name: str, dtype: torch.dtype, int8: bool, plan: str, group: int, dim: int) -> None:
    call = build(Spec(group=group, dim=dim, dtype=dtype, int8=int8, plan=plan, probe_rows=8))
    assert_agrees(run(name, call), judge(call))


@each_backend
@pytest.mark.parametrize("blk", [16, 32, 64, 128])
@pytest.mark.parametrize("scope", ["head", "group", "layer"])
@pytest.mark.parametrize("plan", ["bands", "blocks", "columns", "mixed"])
def test_agrees_on_lists(name: str, plan: str, scope: str, blk: int) -> None:
    call = build(Spec(seed=blk, plan=plan, scope=scope, blk=blk, slots=3, q_tile=32))
    assert_agrees(run(name, call), judge(call))


GRAINS = [(1, 64), (1, 16), (16, 8), (192, 192), (256, 256), (16, 128)]
"""Tiles of one row and tiles longer than any kernel's, blocks of 8 entries and blocks of several KV blocks."""


@each_backend
@pytest.mark.parametrize(("q_tile", "blk"), GRAINS)
@pytest.mark.parametrize("plan", ["bands", "blocks", "columns", "mixed"])
def test_agrees_on_every_grain(name: str, plan: str, q_tile: int, blk: int) -> None:
    """Of tiles and blocks, also where a tile is cut into slices."""
    batch = (Req(330, 90), Req(420, 1, decode=True), Req(129, 150, dropped=0.3, gaps=True, ahead=9))
    call = build(Spec(seed=q_tile + blk, plan=plan, q_tile=q_tile, blk=blk, slots=4, reqs=batch, probe_rows=8))
    assert_agrees(run(name, call, (50, 201)), judge(call))


@each_backend
@each_blocks
@pytest.mark.parametrize(("plan", "blk"), [("every block", 16), ("every block", 192), ("every column", 64)])
def test_lists_of_all_are_dense(name: str, dtype: torch.dtype, int8: bool, plan: str, blk: int) -> None:
    call = build(Spec(dtype=dtype, int8=int8, plan=plan, blk=blk, q_tile=48, probe_rows=8))
    assert_agrees(run(name, call), judge(replace(call, plan=None)))


@each_backend
@each_blocks
@pytest.mark.parametrize("plan", ["none", "bands", "mixed"])
@pytest.mark.parametrize("model_window", [None, 1500])
def test_agrees_on_long_views(name: str, dtype: torch.dtype, int8: bool, plan: str, model_window: int | None) -> None:
    call = build(Spec(dim=64, dtype=dtype, int8=int8, reqs=LONG, plan=plan, model_window=model_window, probe_rows=16))
    assert_agrees(run(name, call), judge(call))


@each_backend
@each_blocks
def test_empty_rows_give_zero(name: str, dtype: torch.dtype, int8: bool) -> None:
    got = run(name, build(Spec(dtype=dtype, int8=int8, plan="empty", probe_rows=9)))
    assert (got.out == 0).all() and (got.lse == -math.inf).all()
    assert all((c == 0).all() for c in sums(got)) and got.stats.visible == 0


@each_backend
@each_dtype
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kind", ["one huge", "all huge", "equal", "zero"])
def test_extreme_values(name: str, dtype: torch.dtype, kind: str, cap: float | None) -> None:
    """Scores of thousands, all scores alike: the largest wins, nothing overflows; capped ones stay below the cap."""
    call = build(Spec(dim=64, dtype=dtype, probe_rows=8, cap=cap))
    scale = {"one huge": 1, "all huge": 300, "equal": 0, "zero": 0}[kind]
    call.q.mul_(scale)
    if kind == "one huge":
        call.q[::7] *= 1000
    if kind == "equal":
        call.layout.v.nan_to_num_().fill_(3)
    got, want = run(name, call), judge(call)
    assert torch.isfinite(got.out).all()
    torch.testing.assert_close(got.out.float(), want.out, atol=1e-2, rtol=2**-7)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-3, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 4097])
def test_agrees_on_lengths(name: str, length: int, int8: bool) -> None:
    """Ends of blocks and splits, for prompt and decode rows."""
    first = max(0, length - 20)
    batch = (Req(first, length - first), Req(length - 1, 1, decode=True))
    call = build(Spec(dim=64, dtype=BF16, int8=int8, reqs=batch, kv_heads=1))
    assert_agrees(run(name, call), judge(call))


# --- what isn't seen can't matter -------------------------------------------------------------------------------------


def poison(call: AttnCall, r0: int, r1: int, free: bool) -> AttnCall:
    """Nan in all blocks of which no row of [r0, r1) sees an entry; `free` takes these blocks away.

    Other entries that nobody sees get another number.
    """
    layout, views = replace_storage(call), []
    for b, view in enumerate(call.kv):
        lo, hi = max(r0, call.rows.row_ptr[b]), min(r1, call.rows.row_ptr[b + 1])
        table = view.table.clone()
        for h, n in enumerate(view.length):
            seen = (
                visible_mask(call, b, h, lo, hi).flatten(0, 1).any(0) if lo < hi else torch.zeros(n, dtype=torch.bool)
            )
            unseen = slots_of(view, h)[~seen][:, None]
            layout.write(unseen, *torch.full((2, len(unseen), 1, layout.head_dim), 55, dtype=layout.dtype))
            used = torch.zeros(table.shape[1], dtype=torch.bool)
            used[seen.nonzero()[:, 0] // BLOCK] = True
            unused = table[h, ~used].long()
            layout.poison(unused[unused > 0])
            table[h] = table[h].where(used | torch.tensor(not free), 0)
        views.append(replace(view, table=table))
    return replace(call, layout=layout, kv=views)


def replace_storage(call: AttnCall):
    """A copy of the call's pool."""
    layout = type(call.layout)(call.layout.k.shape[0], call.layout.head_dim, call.layout.dtype)
    layout.k.copy_(call.layout.k)
    layout.v.copy_(call.layout.v)
    return layout


@each_backend
@pytest.mark.parametrize("free", [False, True])
@few(40)
@given(spec=specs(reqs(), int8=st.booleans()), data=st.data())
def test_unseen_entries_are_not_touched(name: str, free: bool, spec: Spec, data: st.DataObject) -> None:
    call = build(spec)
    n = call.q.shape[0]
    r0, r1 = sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
    clean, bad = fresh(call), fresh(poison(call, r0, r1, free))
    for each in (clean, bad):
        backend(name).attend(each, r0, r1)
    for each in (clean, bad):
        assert torch.isnan(each.out[:r0]).all() and torch.isnan(each.out[r1:]).all()
        each.out.nan_to_num_()
        each.lse.nan_to_num_()
    assert_same_bits(bad, clean)
    assert not torch.isnan(bad.out[r0:r1]).any()


@each_backend
@pytest.mark.parametrize("int8", [False, True])
def test_every_call_reads_what_lies_there_now(name: str, int8: bool) -> None:
    """Columns that were gathered for a call are of no use to the next one."""
    call = build(Spec(dim=64, dtype=BF16, int8=int8, plan="columns"))
    run(name, call)
    number = torch.arange(1, call.layout.k.shape[0]).repeat_interleave(BLOCK) * BLOCK
    slots = (number + torch.arange(BLOCK).repeat(call.layout.k.shape[0] - 1))[:, None]
    call.layout.write(slots, *torch.randn(2, len(slots), 1, 64).bfloat16())
    assert_agrees(run(name, call), judge(call))


# --- parts of a set join to the set -----------------------------------------------------------------------------------


def halves(call: AttnCall, how: str) -> list[AttnCall]:
    """Two calls whose visible sets are disjoint and together the call's."""
    if how == "visible":
        masks = [torch.rand(v.table.shape[0], max(v.length)) < 0.5 for v in call.kv]
        return [
            replace(call, kv=[replace(v, visible=m if keep else ~m) for v, m in zip(call.kv, masks)])
            for keep in (True, False)
        ]
    plan = call.plan
    made = []
    for parity in (0, 1):
        lines = [plan.blk_idx[a:e] for a, e in zip(plan.blk_ptr[:-1], plan.blk_ptr[1:])]
        lines = [line[line % 2 == parity] for line in lines]
        ptr = torch.tensor([0, *(len(line) for line in lines)]).cumsum(0).int()
        made.append(replace(call, plan=replace(plan, blk_idx=torch.cat(lines), blk_ptr=ptr)))
    return made


@each_backend
@pytest.mark.parametrize(("how", "plan"), [("visible", "none"), ("visible", "bands"), ("lists", "blocks")])
@few(15)
@given(spec=specs(reqs(), hidden=0))
def test_disjoint_sets_merge(name: str, how: str, plan: str, spec: Spec) -> None:
    call = build(replace(spec, plan=plan))
    whole, (one, two) = run(name, call), (run(name, half) for half in halves(call, how))
    lse = torch.logaddexp(one.lse, two.lse)
    share = [torch.exp(half.lse - lse).nan_to_num(0)[..., None] for half in (one, two)]
    torch.testing.assert_close(share[0] * one.out + share[1] * two.out, whole.out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole.lse, atol=2e-5, rtol=1e-5)
    assert one.stats.visible + two.stats.visible == whole.stats.visible
