"""Attention: a row's bits are its own, whatever slice, chunk, batch, block numbers and threads it is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from answers import assert_agrees, assert_same_bits, each_backend, each_blocks, run, sums, threads
from cases import LONG, Req, Spec, alone, build, chunk, few, reqs, specs, up_to
from hypothesis import given
from hypothesis import strategies as st

from firstlight.attention.band import Band, BandConfig
from firstlight.core.attn import PlanContext
from firstlight.kernels.contract import SPLIT, AttnCall
from firstlight.kernels.dispatch import fastest


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


BITS = specs(reqs(), dim=16, probe_rows=20)


@each_backend
@each_blocks
@few(20)
@given(spec=BITS, data=st.data())
def test_any_slicing_is_one_call(name: str, dtype: torch.dtype, int8: bool, spec: Spec, data: st.DataObject) -> None:
    call = build(replace(spec, dtype=dtype, int8=int8))
    cuts = data.draw(st.lists(st.integers(0, call.q.shape[0]), min_size=1, max_size=4))
    assert_same_bits(run(name, call, tuple(cuts)), run(name, call))


@each_backend
@each_blocks
@few(20)
@given(spec=BITS)
def test_where_blocks_lie_changes_nothing(name: str, dtype: torch.dtype, int8: bool, spec: Spec) -> None:
    spec = replace(spec, dtype=dtype, int8=int8)
    assert_same_bits(run(name, build(spec)), run(name, build(replace(spec, shuffled=False))))


@each_backend
@each_blocks
@few(20)
@given(spec=BITS)
def test_a_batch_is_its_requests_alone(name: str, dtype: torch.dtype, int8: bool, spec: Spec) -> None:
    call = build(replace(spec, dtype=dtype, int8=int8))
    together = run(name, call)
    singles = [run(name, alone(call, b)) for b in range(len(call.kv))]
    assert torch.equal(together.out, torch.cat([s.out for s in singles]))
    assert torch.equal(together.lse, torch.cat([s.lse for s in singles]))
    for a, b in zip(sums(together), [c for s in singles for c in sums(s)], strict=True):
        assert torch.equal(a, b)


@each_blocks
@pytest.mark.parametrize("plan", ["none", "columns"])
def test_where_rows_are_written_changes_nothing(dtype: torch.dtype, int8: bool, plan: str) -> None:
    """Many of them in whole lines go past the caches, others don't."""
    spec = Spec(reqs=(Req(first=30, num_rows=700),), dim=64, dtype=dtype, int8=int8, plan=plan)
    call = build(spec)
    beside = torch.full((call.out.numel() + 8,), torch.nan, dtype=dtype)[8:].view(call.out.shape)
    for number in (1, 2):
        with threads(number):
            for out in (call.out.fill_(torch.nan), beside.fill_(torch.nan)):
                fastest(64).attend(replace(call, out=out), 0, 700)
            assert torch.equal(call.out, beside)


@each_backend
@each_blocks
@few(20)
@given(spec=BITS, data=st.data())
def test_chunks_are_the_whole(name: str, dtype: torch.dtype, int8: bool, spec: Spec, data: st.DataObject) -> None:
    """A chunk's rows, with the view as it was when they ran, give what they give in one pass."""
    call = build(replace(spec, dtype=dtype, int8=int8))
    lo, hi = call.rows.row_ptr[:2]
    cut = data.draw(st.integers(lo + 1, hi))
    chunks(name, call, [lo, cut, hi])


@each_backend
@each_blocks
@pytest.mark.parametrize("plan", ["none", "mixed"])
@pytest.mark.parametrize("dropped", [0, 0.3])
def test_chunks_are_the_whole_over_splits(name: str, dtype: torch.dtype, int8: bool, plan: str, dropped: float) -> None:
    """Rows on both sides of a split's end."""
    req = Req(2 * SPLIT - 20, 60, dropped=dropped)
    call = build(Spec(dtype=dtype, int8=int8, plan=plan, reqs=(req, Req(2 * SPLIT, 1, decode=True)), probe_rows=30))
    chunks(name, call, [0, 1, 17, 20, 33, 60])
    assert_same_bits(run(name, call, (5, 20, 40)), run(name, call))


@each_backend
@each_blocks
def test_a_split_that_a_slice_does_not_see_keeps_its_place(name: str, dtype: torch.dtype, int8: bool) -> None:
    """The order in which splits are merged follows their numbers, not how many of them somebody sees."""
    call = build(Spec(dtype=dtype, int8=int8, reqs=(Req(4 * SPLIT, 32),), plan="full", scope="layer", q_tile=16))
    every = torch.arange(4 * SPLIT // 64, dtype=torch.int32)
    some = every[every // 16 != 1]
    plan = replace(
        call.plan,
        band=torch.zeros(2, 2, dtype=torch.int32),
        tile_map=torch.tensor([0, 1], dtype=torch.int32),
        blk_ptr=torch.tensor([0, len(some), len(some) + len(every)], dtype=torch.int32),
        blk_idx=torch.cat([some, every]),
    )
    call = replace(call, plan=plan)
    assert_same_bits(run(name, call, (16,)), run(name, call))


@each_backend
@each_blocks
@pytest.mark.parametrize("group", [1, 3])
def test_a_list_alone_decides_what_is_gathered(name: str, dtype: torch.dtype, int8: bool, group: int) -> None:
    """Not how many of its columns are hidden from the rows that happen to be there."""
    req = Req(0, 64)
    call = build(Spec(group=group, dtype=dtype, int8=int8, reqs=(req,), plan="every column", hidden=0.5))
    assert_same_bits(run(name, call, (10, 20, 40)), run(name, call))


def chunks(name: str, call: AttnCall, ends: list[int]) -> None:
    """Compare rows of request 0, chunk by chunk on a growing view, with the whole call."""
    whole = run(name, call)
    for lo, hi in pairwise(ends):
        if lo < hi:
            got = run(name, chunk(call, 0, lo, hi, up_to(call.kv[0], int(call.rows.tok[hi - 1]))))
            assert torch.equal(got.out, whole.out[lo:hi]) and torch.equal(got.lse, whole.lse[lo:hi])


@each_backend
@each_blocks
@pytest.mark.parametrize("batch", [LONG, (*LONG[:1], *(Req(at, 1, decode=True) for at in (40, 1023, 1024, 2300)))])
@pytest.mark.parametrize("plan", ["none", "mixed"])
def test_threads_change_nothing(name: str, dtype: torch.dtype, int8: bool, batch: tuple[Req, ...], plan: str) -> None:
    call = build(Spec(dim=64, dtype=dtype, int8=int8, reqs=batch, plan=plan, probe_rows=16))
    with threads(1):
        one = run(name, call)
    with threads(2):
        assert_same_bits(run(name, call), one)


@each_backend
@each_blocks
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 6])
def test_threads_and_mates_change_no_decode_row(
    name: str, dtype: torch.dtype, int8: bool, group: int, kv_heads: int
) -> None:
    """Few heads and few rows: where matrix libraries change their mind."""
    batch = tuple(Req(at, 1, decode=True) for at in (40, 700, 1023, 1024, 1500))
    call = build(Spec(dim=64, dtype=dtype, int8=int8, reqs=batch, kv_heads=kv_heads, group=group))
    with threads(1):
        one = run(name, call)
    with threads(2):
        assert_same_bits(run(name, call), one)
        for b in range(len(batch)):
            assert torch.equal(run(name, alone(call, b)).out, one.out[b : b + 1])


@each_backend
@few(30)
@given(spec=specs(reqs(), plan="full"))
def test_full_lists_are_dense(name: str, spec: Spec) -> None:
    """Another path to the same keys: within the operator's tolerance."""
    call = build(spec)
    assert_agrees(run(name, call), run(name, replace(call, plan=None)))


@each_backend
@each_blocks
@few(10)
@given(cuts=st.lists(st.integers(1, 599), max_size=3, unique=True), sink=st.integers(0, 64), window=st.integers(1, 400))
def test_band_in_chunks_is_the_whole(
    name: str, dtype: torch.dtype, int8: bool, cuts: list[int], sink: int, window: int
) -> None:
    """Where a prompt is cut changes no bit of a row."""
    planner = Band(BandConfig(sink, window))
    call = build(Spec(dtype=dtype, int8=int8, reqs=(Req(0, 600),)))
    whole = run(name, planned(call, planner))
    for lo, hi in pairwise([0, *sorted(cuts), 600]):
        got = run(name, planned(chunk(call, 0, lo, hi, up_to(call.kv[0], hi - 1)), planner))
        assert torch.equal(got.out, whole.out[lo:hi]) and torch.equal(got.lse, whole.lse[lo:hi])


def planned(call: AttnCall, planner: Band) -> AttnCall:
    """The call of one request with the plan that a planner makes for it."""
    ctx = PlanContext(
        layer=0,
        q=call.q,
        tok=call.rows.tok,
        pos=call.rows.pos,
        num_kv_heads=call.kv[0].table.shape[0],
        prompt_len=600,
        is_last_chunk=True,
        keys=lambda: call.layout.read_blocks(call.kv[0].table)[0],
        state={},
    )
    return replace(call, plan=planner.plan(ctx))
