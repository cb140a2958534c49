"""The laws of `sarathi`, on random mixes and on the cases that its text names."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixes import SLICE_S, Mix, Step, Stretch, mixes, play, ready, rows, stretches

from firstlight.core.errors import UserError
from firstlight.core.schedule import Admitted, Arrival, Cut, Plan, Preempted, Segment, UnitDone
from firstlight.core.view import RequestView, View, ViewConfig
from firstlight.schedule.lane import reach
from firstlight.schedule.sarathi import Sarathi, SarathiConfig
from firstlight.simulate.executor import SimRequest

# --- laws, on random mixes -------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(mixes())
def test_laws(mix: Mix) -> None:
    """Beside those of every schedule, which are in test_schedules.py."""
    steps = play(mix)
    policy = mix.policy()
    ran = stretches(steps)
    for step in steps:
        admissions_follow_rank(mix, step)
        assert sum(live.state == "yielded" for live in step.view.units.values()) <= 1
        for unit in step.plan.submit:
            assert step.plan.admit == ()
            if unit.yield_at == "none":
                a_unit_keeps_the_budget(policy, step, unit.segments)
            else:
                a_long_unit_has_a_reason(policy, step, unit.segments)
    decodes_never_miss_two(ran)
    gaps_are_bounded(mix, steps, ran)


def rank(mix: Mix, request: RequestView) -> float:
    return request.arrival + request.priority * mix.schedule.ageing_s


def admissions_follow_rank(mix: Mix, step: Step) -> None:
    """Also the ageing bound: who overtakes has the smaller number and came within the difference."""
    waiting = [r for r in step.view.requests.values() if r.is_waiting]
    for rid in step.plan.admit:
        chosen = step.view.requests[rid]
        for other in (r for r in waiting if r.rid not in step.plan.admit and r.arrival <= chosen.arrival):
            allowed = (other.priority - chosen.priority) * mix.schedule.ageing_s
            assert chosen.arrival - other.arrival < allowed or (chosen.arrival == other.arrival and allowed >= 0)


def is_indivisible(request: RequestView) -> bool:
    return request.whole_prompt or not request.is_prefilling


def a_unit_keeps_the_budget(policy: Sarathi, step: Step, segments: tuple[Segment, ...]) -> None:
    """Rows, all decodes, order of ranks without skipping, progress of the first prompt, and what a request demands."""
    view, budget = step.view, policy.budget
    assert rows(segments) <= budget
    kinds = [s.kind for s in segments]
    assert kinds == sorted(kinds, reverse=True), "prefill rows come before decode rows"
    chosen = {s.rid: s for s in segments}
    assert len(chosen) == len(segments)
    assert {r.rid for r in ready(step) if r.is_decoding} <= set(chosen)
    ranked = [r for r in policy.ranked(view) if r in ready(step) and not r.is_decoding]
    first = next(iter(ranked), None)
    if first and is_indivisible(first) and first.rid not in chosen:
        ranked = ranked[1:]  # too long for a unit: its own turn is the next
    served = [r.rid in chosen for r in ranked]
    assert served == sorted(served, reverse=True), "a prompt was skipped"
    if first and not is_indivisible(first) and not view.units:
        segment, least = chosen[first.rid], budget - policy.max_num_seqs + 1
        left = first.n_tokens - first.f[segment.layer[0]]
        assert rows([segment]) >= min(left, first.chunk or left, least)


def a_long_unit_has_a_reason(policy: Sarathi, step: Step, segments: tuple[Segment, ...]) -> None:
    (segment,) = segments
    request = step.view.requests[segment.rid]
    others = [r for r in ready(step) if r.rid != request.rid]
    assert rows(segments) > policy.budget - sum(r.is_decoding for r in others)
    assert is_indivisible(request) or (policy.config.lift and not others)


def decodes_never_miss_two(ran: list[Stretch]) -> None:
    missed: Counter[str] = Counter()
    for stretch in ran:
        inside = {s.rid for s in stretch.unit.segments}
        waiting = {r.rid for r in stretch.view.requests.values() if r.state == "running" and r.is_decoding} - inside
        missed = Counter({rid: missed[rid] + 1 for rid in waiting})
        assert max(missed.values(), default=0) < 2


def gaps_are_bounded(mix: Mix, steps: list[Step], ran: list[Stretch]) -> None:
    """Two units and a slice between two tokens, however long the prompts are that come."""
    preempted = {e.rid for step in steps for e in step.events if isinstance(e, Preempted)}
    longest = max((s.dur for s in ran if s.unit.yield_at == "none"), default=0.0)
    for request in (r for r in mix.requests if r.rid not in preempted):
        gaps = [b - a for a, b in pairwise(request.token_at)]
        assert max(gaps, default=0.0) <= 2 * longest + SLICE_S + 1e-9


# --- the cases that the text names -----------------------------------------------------------------------------------


def mix_of(*requests: SimRequest, columns: int = 400, max_num_seqs: int = 4, **settings) -> Mix:
    config = ViewConfig(4, 12, 12 * columns, max_num_seqs, 4096)
    return Mix(config, SarathiConfig(**settings), requests)


def units_of(mix: Mix) -> list[tuple[str, int]]:
    return [(s.unit.yield_at, rows(s.unit.segments)) for s in stretches(play(mix))]


def test_a_lone_prompt_is_one_unit() -> None:
    assert units_of(mix_of(SimRequest("a", 0.0, 2000, 1))) == [("slice", 2000)]
    assert units_of(mix_of(SimRequest("a", 0.0, 2000, 1), lift=False)) == [("none", 512)] * 3 + [("none", 464)]
    assert units_of(mix_of(SimRequest("a", 0.0, 2000, 1, chunk=900))) == [("slice", 900)] * 2 + [("none", 200)]


@pytest.mark.parametrize("lift", [True, False])
def test_edges_of_the_budget_alone(lift: bool) -> None:
    """A prompt that fits is an ordinary unit either way."""
    units = [units_of(mix_of(SimRequest("a", 0.0, n, 1), lift=lift)) for n in (1, 512, 513)]
    assert units == [[("none", 1)], [("none", 512)], [("slice", 513)] if lift else [("none", 512), ("none", 1)]]


@pytest.mark.parametrize("n_tokens", [1, 511, 512, 513])
def test_edges_of_the_budget_beside_a_decode(n_tokens: int) -> None:
    mix = mix_of(SimRequest("a", 0.0, 10, 50), SimRequest("b", 0.01, n_tokens, 1))
    chunks = [s.tok for step in play(mix) for unit in step.plan.submit for s in unit.segments if s.rid == "b"]
    assert chunks == ([(0, n_tokens)] if n_tokens <= 511 else [(0, 511), (511, n_tokens)])


def test_a_hit_of_all_but_one_token() -> None:
    assert units_of(mix_of(SimRequest("a", 0.0, 2000, 2, n_hit=1999))) == [("none", 1), ("none", 1)]


def test_company_halves_a_long_prompt() -> None:
    long, short = SimRequest("long", 0.0, 20_000, 1), SimRequest("short", 0.1, 10, 60)
    ran = stretches(play(mix_of(long, short)))
    assert short.token_at[0] <= 0.1 + 2 * SLICE_S, "the long prompt stops within a slice"
    shared = [s for s in ran if len(s.view.requests) == 2]
    for turn, other in zip(shared[1::2], shared[::2]):
        assert (turn.unit.yield_at, other.unit.yield_at) == ("slice", "none")
        assert other.dur <= turn.dur <= other.dur + SLICE_S or turn is shared[-1]
    assert long.ended_at is not None and short.ended_at is not None and short.ended_at < long.ended_at
    assert len({s.unit.uid for s in ran if s.unit.yield_at == "slice"}) == 1, "one unit, resumed again and again"


def test_an_arrival_does_not_cut_a_long_units_turn_short() -> None:
    """Else a stream of arrivals would leave it a slice each."""
    requests = [SimRequest("long", 0.0, 40_000, 1), SimRequest("other", 0.01, 6000, 1)]
    requests += [SimRequest(f"s{i:02}", 0.2 + i * 0.021, 1, 1) for i in range(90)]
    ran = stretches(play(mix_of(*requests, columns=900, max_num_seqs=100)))
    turns = [(s.dur, other.dur) for other, s in pairwise(ran[1:]) if s.unit.yield_at != other.unit.yield_at == "none"]
    assert len(turns) > 5 and all(mine >= others for mine, others in turns[:-1])


def test_the_long_unit_of_the_last_in_rank_may_be_preempted() -> None:
    """It holds blocks that the decodes of requests before it need; it starts again when they are done."""
    long = SimRequest("long", 0.0, 3000, 1, priority=1)
    urgent = [SimRequest(f"u{i}", 0.05, 60, 300) for i in range(3)]
    steps = play(mix_of(long, *urgent, columns=51, ageing_s=60.0))
    (at,) = [step for step in steps if step.plan.preempt]
    assert at.plan.preempt == (("long", "recompute"),)
    assert [live.state for live in at.view.units.values()] == ["yielded"]
    assert long.ended_at > max(r.ended_at for r in urgent)


def test_a_whole_prompt_over_the_budget_shares_too() -> None:
    decode, whole = SimRequest("decode", 0.0, 10, 400), SimRequest("whole", 0.05, 3000, 1, whole_prompt=True)
    ran = stretches(play(mix_of(decode, whole)))
    assert {rows(s.unit.segments) for s in ran if s.unit.yield_at == "slice"} == {3000}
    assert whole.ended_at < decode.ended_at


def test_barriers_make_strips_but_not_for_a_prompt_that_fits() -> None:
    def shapes(n_tokens: int):
        mix = mix_of(SimRequest("a", 0.0, n_tokens, 1, barriers=(1,)), lift=False)
        return [(s.tok, s.layer) for step in play(mix) for unit in step.plan.submit for s in unit.segments]

    assert shapes(500) == [((0, 500), (0, 4))]
    strips = [(0, 512), (512, 600)]
    assert shapes(600) == [(tok, (0, 2)) for tok in strips] + [(tok, (2, 4)) for tok in strips]


def test_the_last_in_rank_is_preempted_and_replays_its_tokens() -> None:
    first, last = SimRequest("first", 0.0, 100, 200), SimRequest("last", 0.0, 100, 200)
    steps = play(mix_of(first, last, columns=7, token_budget=64))
    preempted = [rid for step in steps for rid, _ in step.plan.preempt]
    assert preempted and set(preempted) == {"last"}
    assert len(first.token_at) == len(last.token_at) == 200 and first.ended_at < last.ended_at
    replays = [
        s for step in steps for u in step.plan.submit for s in u.segments if s.kind == "decode" and rows([s]) > 1
    ]
    assert len(replays) == len(preempted)
    assert all(s.rid == "last" and s.tok[0] == 100 for s in replays)


def test_priority_is_worth_its_seconds_and_no_more() -> None:
    """Both wait for the one seat: the later is served first only if it came within the bound."""
    for delay, order in [(0.8, ["seat", "urgent", "patient"]), (1.2, ["seat", "patient", "urgent"])]:
        seat, patient = SimRequest("seat", 0.0, 10, 2000), SimRequest("patient", 0.1, 10, 1, priority=1)
        urgent = SimRequest("urgent", 0.1 + delay, 10, 1)
        mix = mix_of(seat, patient, urgent, max_num_seqs=1, ageing_s=1.0)
        play(mix)
        assert seat.ended_at > 1.5
        assert [r.rid for r in sorted(mix.requests, key=lambda r: r.admitted_at[0])] == order


def test_a_short_prompt_does_not_wait_for_a_long_ones_admission_twice() -> None:
    """Strict order: nobody slips past a prompt whose blocks are not there yet."""
    holder, big, small = SimRequest("h", 0.0, 100, 90), SimRequest("i", 0.01, 500, 1), SimRequest("j", 0.02, 10, 1)
    play(mix_of(holder, big, small, columns=8))
    assert big.admitted_at[0] >= holder.ended_at and small.admitted_at[0] >= big.admitted_at[0]


@pytest.mark.parametrize("grow", [0, 4])
def test_the_last_free_block_admits(grow: int) -> None:
    """All that a prompt needs has to be there, beside what the next tokens of others take, and no block more."""
    config = ViewConfig(4, 4, 400, 4, 4096)
    policy = Sarathi(SarathiConfig(), config)
    for free, admitted in ((40 + grow, ("b",)), (39 + grow, ())):
        view = View.start(config).after(0.0, [Arrival("a", 64, 64, 8, 9)])
        view = view.after_plan(policy.step(0.0, [], view)).after(0.0, [Admitted("a", 0, free_blocks=392)])
        view = view.after_plan(policy.step(0.0, [], view))
        done = UnitDone(0, 0.1, sampled={"a": 1}, grow={"a": grow} if grow else {}, free_blocks=free)
        view = view.after(0.1, [done, Arrival("b", 639, 639, 40, 1)])
        assert view.free_blocks == free and policy.step(0.1, [], view).admit == admitted


@settings(max_examples=200)
@given(st.lists(st.integers(0, 64), min_size=3, max_size=3), st.integers(0, 150), st.integers(0, 200))
def test_rows_after_a_cut_are_those_alive(kept: list[int], t0: int, room: int) -> None:
    """No more rows than room whichever rows of a group are alive, and never less ground than the room itself."""
    view = View.start(ViewConfig(2, 4, 400, 2, 512)).after(0.0, [Arrival("a", 150, 150, 12, 1, barriers=(0,))])
    view = view.after(0.0, [Admitted("a", 0, free_blocks=1), Cut("a", 0, tuple(kept), 0, free_blocks=1)])
    request = view.requests["a"]
    assert reach(request, t0, 0, room)[0] == min(150, t0 + room), "below the cut all rows are alive"
    t1, n = reach(request, t0, 1, room)
    group_rows = [min(kept[g], max(0, min(t1, 64 * g + 64) - max(t0, 64 * g))) for g in range(3)]
    assert sum(group_rows) <= n <= room and min(150, t0 + room) <= t1 <= 150


def test_survivors_of_a_cut_go_on_together() -> None:
    config = ViewConfig(4, 8, 800, 2, 512)
    policy = Sarathi(SarathiConfig(token_budget=100, lift=False), config)
    view = View.start(config).after(0.0, [Arrival("a", 300, 300, 40, 1, barriers=(1,))])
    view = view.after(0.0, [Admitted("a", 0, free_blocks=760)])
    for _ in range(3):
        plan = policy.step(0.0, [], view)
        view = view.after_plan(plan).after(0.0, [UnitDone(plan.submit[0].uid, 0.1, free_blocks=760)])
    view = view.after(0.0, [Cut("a", 1, (20, 20, 20, 20, 20), 0, free_blocks=760)])
    assert policy.step(0.0, [], view).submit[0].segments == (Segment("a", "prefill", (0, 300), (2, 4)),)


def test_nothing_to_do_is_an_empty_plan() -> None:
    config = ViewConfig(2, 4, 40, 2, 64)
    assert Sarathi(SarathiConfig(), config).step(0.0, [], View.start(config)) == Plan()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="64 decodes would fill a unit of 64 tokens"):
        Sarathi(SarathiConfig(token_budget=64), ViewConfig(2, 4, 40, 64, 4096))
    with pytest.raises(UserError, match="max-num-batched-tokens"):
        Sarathi(SarathiConfig(), ViewConfig(2, 4, 40, 32, 32))
    for wrong in ({"token_budget": 1}, {"ageing_s": -1.0}, {"ageing_s": float("nan")}):
        with pytest.raises(UserError):
            SarathiConfig(**wrong)
