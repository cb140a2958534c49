"""`flowprefill`: who is first, how soon the urgent start, what streams get meanwhile, and the fitted rates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixes import SLICE_S, Mix, Step, mixes, play, stretches

from firstlight.core.schedule import (
    Admitted,
    Arrival,
    Plan,
    Preempted,
    Segment,
    Timer,
    UnitDone,
    UnitYielded,
    WorkUnit,
)
from firstlight.core.view import View, ViewConfig
from firstlight.schedule import flowprefill
from firstlight.schedule.flowprefill import FlowPrefill, FlowPrefillConfig
from firstlight.schedule.pace import Pace, Work, work_of
from firstlight.simulate.executor import SimRequest

CELL_S = 5e-5
CONFIG = ViewConfig(4, 12, 12 * 2000, 16, 4096)
"""Of `mixes`' cost model: 0.2 ms a row of four layers, and some for its reads."""


def mix_of(*requests: SimRequest, columns: int = 2000, max_num_seqs: int = 16, **settings: float) -> Mix:
    config = ViewConfig(4, 12, 12 * columns, max_num_seqs, 4096)
    return Mix(config, FlowPrefillConfig(**settings), requests)


def prefills(steps: list[Step]) -> list[tuple[str, ...]]:
    """Who shares each prefill unit, in order of submission."""
    return [tuple(s.rid for s in u.segments) for step in steps for u in step.plan.submit if u.yield_at != "none"]


def num_yields(steps: list[Step]) -> int:
    return sum(isinstance(event, UnitYielded) for step in steps for event in step.events)


# --- who is first ----------------------------------------------------------------------------------------------------


def test_an_urgent_prompt_starts_within_a_slice_and_the_other_goes_on() -> None:
    long, urgent = SimRequest("long", 0.0, 8000, 1), SimRequest("urgent", 0.3003, 100, 1, ttft_slo_s=0.05)
    steps = play(mix_of(long, urgent))
    own = 0.002 + 100 * 4 * (CELL_S + 50e-9)
    assert urgent.token_at[0] <= 0.3003 + SLICE_S + own
    assert prefills(steps) == [("long",), ("urgent",)], "the long one is resumed, not begun again"
    assert num_yields(steps) == 1 and long.ended_at == max(long.ended_at, urgent.ended_at)


def test_without_a_wish_a_short_prompt_passes_a_long_one() -> None:
    """Its deadline is near because it takes little; but only once the rates are known."""
    first = SimRequest("first", 0.0, 4000, 1)
    long, short = SimRequest("long", 1.5, 20_000, 1), SimRequest("short", 1.6, 100, 1)
    play(mix_of(first, long, short))
    assert short.ended_at < 1.6 + 0.05 < long.ended_at


def ranked(view: View, **settings: float) -> list[str]:
    policy = FlowPrefill(FlowPrefillConfig(**settings), CONFIG)
    return [r.rid for r in policy.ranked(view)]


def waiting(now: float, *arrivals: tuple[str, float, int, float | None, int]) -> View:
    """(name, when, tokens, wish, priority); a row takes a millisecond."""
    view = View.start(CONFIG)
    for rid, at, tokens, slo, priority in arrivals:
        view = view.after(at, [Arrival(rid, tokens, tokens, 12, 1, ttft_slo_s=slo, priority=priority)])
    pace = Pace().after(Work(1000, 0.0), 1.0).after(Work(1000, 1e9), 1.0).sums
    return view.after_plan(Plan(memo={"pace": pace})).after(now, [])


def test_the_earliest_deadline_first_then_the_latest_of_the_late() -> None:
    view = waiting(
        2.0,
        ("late", 0.0, 1000, 2.5, 0),  # 0.5 s left for 1 s of work
        ("later", 0.0, 1000, 1.0, 0),
        ("latest", 0.0, 5000, 6.0, 0),
        ("soon", 0.0, 1000, 3.5, 0),
        ("sooner", 1.0, 900, 2.0, 0),
        ("silent", 1.0, 500, None, 0),  # 1 s and four times its 0.5 s
    )
    assert ranked(view) == ["sooner", "soon", "silent", "latest", "late", "later"]
    assert ranked(view, slo_factor=10.0) == ["sooner", "soon", "silent", "latest", "late", "later"]
    assert ranked(view, slo_factor=0.0)[:2] == ["sooner", "soon"], "half a second left, and half a second of work: late"


def test_priority_moves_deadlines_on_either_side() -> None:
    asked = [("a", 0.0, 10, 5.0, 0), ("b", 0.0, 10, 6.0, -1), ("c", 0.0, 10, 1.0, 0), ("d", 0.0, 10, 0.5, -1)]
    assert ranked(waiting(2.0, *asked), ageing_s=0.5) == ["a", "b", "c", "d"]
    assert ranked(waiting(2.0, *asked), ageing_s=2.0) == ["b", "a", "d", "c"]


def test_one_that_has_tokens_is_never_late() -> None:
    """It was preempted: its stream stands still, and its deadline is the oldest."""
    view = waiting(0.0, ("a", 0.0, 10, 1.0, 0))
    view = view.after(0.5, [Admitted("a", 0, free_blocks=9)])
    view = view.after_plan(Plan(submit=(WorkUnit(0, (Segment("a", "prefill", (0, 10), (0, 4)),), "slice"),)))
    view = view.after(0.6, [UnitDone(0, 0.1, sampled={"a": 1}, free_blocks=9)])
    view = view.after(9.0, [Preempted("a", "recompute", 12, free_blocks=9), Arrival("b", 10, 10, 12, 1)])
    assert ranked(view) == ["a", "b"]


@pytest.mark.parametrize("slo", [None, 0.5, 1e-3])
def test_equal_deadlines_go_in_order_of_arrival_without_a_yield(slo: float | None) -> None:
    """Also the hopeless ones, and all of them come at one time stamp."""
    same = [SimRequest(f"r{i}", 0.1, 3000, 1, ttft_slo_s=slo) for i in range(4)]
    steps = play(mix_of(*same))
    assert [r.rid for r in sorted(same, key=lambda r: r.ended_at or inf)] == ["r0", "r1", "r2", "r3"]
    assert num_yields(steps) == 0
    assert all(later.admitted_at[0] >= (one.ended_at or inf) for one, later in pairwise(same)), "blocks were kept free"


@settings(max_examples=60)
@given(mixes(schedule="flowprefill"))
def test_few_stand_half_through(mix: Mix) -> None:
    for step in play(mix):
        assert sum(u.state == "yielded" for u in step.view.units.values()) <= mix.schedule.max_parked + 1


def test_no_more_begin_than_may_stand() -> None:
    """Each comes more urgent than the one before it; without room to stand they wait."""
    for parked, order in [(0, ["a", "d", "c", "b"]), (1, ["b", "d", "c", "a"]), (4, ["d", "c", "b", "a"])]:
        several = [SimRequest(rid, i / 10, 4000, 1, ttft_slo_s=30 - i) for i, rid in enumerate("abcd")]
        play(mix_of(*several, max_parked=parked))
        assert [r.rid for r in sorted(several, key=lambda r: r.ended_at or inf)] == order


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_those_that_run_drain_before_one_without_blocks_starts() -> None:
    """Nobody loses work to an arrival; nor does a smaller one slip past that would fit."""
    big, urgent = SimRequest("big", 0.0, 3000, 1), SimRequest("urgent", 0.1, 1500, 1, ttft_slo_s=1.0)
    small = SimRequest("small", 0.15, 60, 1, ttft_slo_s=30.0)
    steps = play(mix_of(big, urgent, small, columns=56))
    assert num_yields(steps) == 0 and prefills(steps)[0] == ("big",)
    assert urgent.admitted_at[0] >= big.ended_at and small.admitted_at[0] >= big.ended_at
    assert not [step for step in steps if step.plan.preempt]


def test_a_cancelled_one_that_stood_half_through_is_gone() -> None:
    gone, urgent = SimRequest("gone", 0.0, 8000, 1, cancel_at=0.35), SimRequest("u", 0.3, 3000, 1, ttft_slo_s=2.0)
    after = SimRequest("after", 0.31, 8000, 1, ttft_slo_s=20.0)
    steps = play(mix_of(gone, urgent, after, columns=180))
    assert gone.token_at == [] and 0 <= gone.ended_at - 0.35 < 1.1 * SLICE_S
    assert prefills(steps) == [("gone",), ("u",), ("after",)]


# --- short prompts share a unit --------------------------------------------------------------------------------------


def units_of(*requests: SimRequest, **settings: float) -> list[tuple[str, ...]]:
    return prefills(play(mix_of(*requests, **settings)))


def short(rid: str, tokens: int = 300, slo: float | None = None, **about: float) -> SimRequest:
    return SimRequest(rid, 0.1, tokens, 1, ttft_slo_s=slo, **about)


def test_short_prompts_share_a_unit_up_to_its_size() -> None:
    assert units_of(short("a"), short("b"), short("c", 900), short("d")) == [("a", "b", "c", "d")]
    assert units_of(short("a"), short("b"), short("c", 900), short("d"), batch_tokens=1000) == [("a", "b", "d"), ("c",)]
    assert units_of(short("a"), short("b"), batch_tokens=299) == [("a",), ("b",)]
    assert units_of(short("a", 3000), short("b"), short("c")) == [("a",), ("b", "c")]


def test_nobody_joins_who_would_make_the_first_late() -> None:
    """300 rows take 0.06 s: a keeps a tenth of its time with b, not with c; and has none to give when it is short."""

    def after_warm_up(*requests: SimRequest) -> list[tuple[str, ...]]:
        return units_of(SimRequest("warm", 0.0, 400, 1), *requests)[1:]

    assert after_warm_up(short("a", slo=0.15), short("b", slo=9.0), short("c", slo=9.0)) == [("a", "b"), ("c",)]
    assert after_warm_up(short("a", slo=0.09), short("b", slo=9.0)) == [("a",), ("b",)]


def test_a_unit_of_several_is_as_urgent_as_its_first() -> None:
    long = SimRequest("long", 0.0, 8000, 1, ttft_slo_s=60.0)
    steps = play(
        mix_of(long, short("a", slo=1.0), short("b", slo=100.0), SimRequest("c", 0.12, 500, 1, ttft_slo_s=5.0))
    )
    assert prefills(steps) == [("long",), ("a", "b"), ("c",)] and num_yields(steps) == 1


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_ms", [30.0, 50.0, 100.0])
def test_streams_get_their_tokens_beside_a_long_prompt(every_ms: float) -> None:
    streams = [SimRequest(f"s{i}", 0.0, 5, 120) for i in range(4)]
    long = SimRequest("long", 0.2, 8000, 1)
    steps = play(mix_of(*streams, long, decode_every_ms=every_ms))
    decode = max(s.dur for s in stretches(steps) if s.unit.yield_at == "none")
    gaps = [b - a for s in streams for a, b in pairwise(s.token_at) if 0.2 <= b <= long.ended_at]
    slack = every_ms / 1000 - flowprefill.SLICE_S
    assert len(gaps) > 60 and max(gaps) <= max(slack, 2 * decode) + SLICE_S + 1e-9
    assert max(gaps[8:-8]) > 0.7 * slack, "no oftener than was asked for"


def test_at_0_they_wait() -> None:
    stream, long = SimRequest("s", 0.0, 5, 120), SimRequest("long", 0.2, 8000, 1)
    steps = play(mix_of(stream, long, decode_every_ms=0.0))
    assert not [t for t in stream.token_at if 0.22 < t < long.ended_at] and num_yields(steps) == 0
    assert len(stream.token_at) == 120


@settings(max_examples=60)
@given(mixes(schedule="flowprefill"))
def test_at_0_no_clock_wakes_it(mix: Mix) -> None:
    """It decides when something happened, once at most each time: in how long a prompt is read has no part in it."""
    steps = play(replace(mix, schedule=replace(mix.schedule, decode_every_ms=0.0)))
    events = [event for step in steps for event in step.events]
    assert not any(isinstance(event, Timer) for event in events)
    assert len(steps) <= len(events) and all(step.events and step.plan.wake_at is None for step in steps)


def test_at_0_a_prompt_of_any_length_takes_as_many_decisions() -> None:
    """It came, it is in, it is done."""
    assert [len(play(mix_of(SimRequest("a", 0.0, n, 1), decode_every_ms=0.0))) for n in (10, 500, 9000)] == [3, 3, 3]


def test_prompts_keep_half_of_the_time() -> None:
    """Even where a step takes longer than `decode_every_ms`."""
    streams = [SimRequest(f"s{i}", 0.0, 5, 150) for i in range(16)]
    long = SimRequest("long", 0.3, 2000, 1)
    ran = stretches(play(mix_of(*streams, long, max_num_seqs=17, decode_every_ms=1.0)))
    mine = [s for s in ran if s.unit.segments[0].rid == "long"]
    others = [s.dur for s in ran if s.view.now > 0.3 and s.unit.yield_at == "none" and s.view.now < long.ended_at]
    assert len(mine) > 20 and sum(s.dur for s in mine) >= 0.95 * sum(others)


@settings(max_examples=60)
@given(mixes(schedule="flowprefill"))
def test_gaps_are_bounded(mix: Mix) -> None:
    """Where nobody waits for blocks: the period that was asked for, or two steps, and a slice."""
    steps = play(mix)
    ran = [s.dur for s in stretches(steps) if s.unit.yield_at == "none"]
    if not mix.schedule.decode_every_ms or not ran:
        return
    if any(sum(r.grow for r in step.view.requests.values()) > step.view.free_blocks for step in steps):
        return
    most = max(mix.schedule.decode_every_ms / 1000, 2 * max(ran)) + SLICE_S + 1e-9
    for request in mix.requests:
        assert max((b - a for a, b in pairwise(request.token_at)), default=0.0) <= most


# --- rates -----------------------------------------------------------------------------------------------------------

RATES = st.floats(1e-6, 1e-2), st.floats(1e-10, 1e-6)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=12), *RATES, st.floats(0.5, 1.0))
def test_two_rates_are_found_again(lengths: list[int], a: float, b: float, share: float) -> None:
    """Near enough at the lengths that matter; never one below zero, so nothing is wild beyond what was seen."""
    pace = Pace()
    for length in lengths:
        pace = pace.after(Work(length, length**2 / 2), a * length + b * length**2 / 2)
    n = share * max(lengths)
    if len(set(lengths)) == 1:
        n = lengths[0]
    assert pace.seconds(Work(n, n * n / 2)) == pytest.approx(a * n + b * n * n / 2, rel=0.25)
    assert 0 < pace.seconds(Work(n, n * n / 2)) <= pace.seconds(Work(2 * n, 2 * n * n))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e9), st.floats(1e-6, 1e3) | st.just(0.0)), max_size=20))
def test_rates_of_anything_are_no_nonsense(seen: list[tuple[float, float, float]]) -> None:
    pace = Pace()
    for rows, reads, seconds in seen:
        pace = pace.after(Work(rows, reads), seconds)
    assert 0 <= pace.seconds(Work(1000, 1e6)) < inf


def test_a_machine_that_slows_down_is_noticed() -> None:
    pace = Pace()
    for n in range(80):
        pace = pace.after(Work(1000, 500_000), 1.0 if n < 20 else 2.0)
    assert 1.9 < pace.seconds(Work(1000, 500_000)) <= 2.0


def test_work_is_counted_in_whole_passes() -> None:
    assert work_of(Segment("a", "prefill", (100, 300), (0, 2)), 4) == Work(100, 20_000)


def test_the_stretches_of_a_stopped_prefill_are_one_observation() -> None:
    """Not the last one alone, which would make the machine look fast."""
    long = SimRequest("long", 0.0, 8000, 1, ttft_slo_s=60.0)
    others = [SimRequest(f"u{i}", 0.2 + i / 5, 3, 9, ttft_slo_s=0.1) for i in range(4)]
    steps = play(mix_of(long, *others, batch_tokens=2))
    assert num_yields(steps) > 4
    pace = Pace.of(steps[-1].plan.memo["pace"])
    true = 8000 * 4 * (CELL_S + 4000e-9)
    assert pace.seconds(Work(8000, 8000 * 4000)) == pytest.approx(true, rel=0.05)
    assert "ran" not in steps[-1].plan.memo


def test_a_prefill_that_was_cancelled_teaches_nothing() -> None:
    steps = play(mix_of(SimRequest("gone", 0.0, 8000, 1, cancel_at=0.05)))
    assert "pace" not in steps[-1].plan.memo
