"""What every schedule owes, on random mixes: served to the end, prompts tiled, what `schedule/lane.py` promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixes import NAMES, Mix, Step, make_mix, mixes, play, ready, rows, stretches

from firstlight.core.errors import UserError
from firstlight.core.schedule import Admitted, Event, Plan, Preempted, Segment, UnitDone
from firstlight.core.view import RequestView, View, ViewConfig
from firstlight.schedule.flowprefill import FlowPrefill
from firstlight.schedule.lane import OneLane
from firstlight.simulate.executor import SimRequest


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(data=st.data())
def test_laws(name: str, data: st.DataObject) -> None:
    """The executor itself refuses illegal segments, busy or cancelled requests and an over-committed pool."""
    mix = data.draw(mixes(schedule=name))
    steps = play(mix)
    all_are_served(mix)
    prompts_are_tiled(mix, steps)
    policy = mix.policy()
    for step in steps:
        preemption_spares_the_first(policy, step)
        the_first_to_wait_is_admitted_first(policy, step)
        for unit in step.plan.submit:
            for segment in unit.segments:
                a_request_gets_what_it_demands(step.view.requests[segment.rid], segment)
    the_pool_is_whole_again(mix, steps)


def all_are_served(mix: Mix) -> None:
    for request in mix.requests:
        finished = len(request.token_at) == request.n_output
        assert finished or request.cancel_at <= request.ended_at, f"{request.rid} didn't finish"


def as_ranked(policy: OneLane, step: Step) -> View:
    """What the policy ranked by: with what it learnt from these very events."""
    learnt = isinstance(policy, FlowPrefill) and {"memo": policy._learnt(step.events, step.view)}
    return replace(step.view, **(learnt or {}))


def preemption_spares_the_first(policy: OneLane, step: Step) -> None:
    alive = [r for r in policy.ranked(as_ranked(policy, step)) if r.state == "running"]
    for rid, how in step.plan.preempt:
        assert how == "recompute" and not step.plan.submit and len(alive) > 1
        assert rid == alive[-1].rid


def the_first_to_wait_is_admitted_first(policy: OneLane, step: Step) -> None:
    waiting = [r.rid for r in policy.ranked(as_ranked(policy, step)) if r.is_waiting]
    assert step.plan.admit[:1] == tuple(waiting[:1]) or not step.plan.admit


def a_request_gets_what_it_demands(request: RequestView, segment: Segment) -> None:
    if segment.kind == "decode":
        assert segment.tok == (request.f[-1], request.n_known)
    elif request.whole_prompt:
        assert segment.tok[1] == request.n_tokens
    elif request.chunk:
        assert rows([segment]) <= request.chunk


def prompts_are_tiled(mix: Mix, steps: list[Step]) -> None:
    """Between admission and the end of a prompt each of its cells is computed once."""
    cells: dict[str, Counter[tuple[int, int]]] = {}
    units = {unit.uid: unit for step in steps for unit in step.plan.submit}
    by_rid = {r.rid: r for r in mix.requests}
    for event in (e for step in steps for e in step.events):
        if isinstance(event, Admitted):
            cells[event.rid] = Counter()
        elif isinstance(event, Preempted):
            cells.pop(event.rid)
        elif isinstance(event, UnitDone):
            for s in (s for s in units[event.uid].segments if s.kind == "prefill" and s.rid in cells):
                cells[s.rid].update((t, layer) for t in range(*s.tok) for layer in range(*s.layer))
            for rid in event.sampled:
                r = by_rid[rid]
                whole = {(t, layer) for t in range(r.n_hit, r.n_tokens) for layer in range(mix.config.num_layers)}
                assert cells[rid].keys() == whole and max(cells[rid].values(), default=1) == 1


def the_pool_is_whole_again(mix: Mix, steps: list[Step]) -> None:
    last = steps[-1].view
    assert last.free_blocks == mix.config.total_blocks and not last.requests and not last.units


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(data=st.data())
def test_decodes_ride_on(name: str, data: st.DataObject) -> None:
    """Every unit that isn't a long prefill has all decodes that are ready."""
    for step in play(data.draw(mixes(schedule=name))):
        for unit in step.plan.submit:
            decoding = {r.rid for r in ready(step) if r.is_decoding}
            assert unit.yield_at != "none" or decoding <= {s.rid for s in unit.segments}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 640), min_size=2, max_size=6), dice=st.randoms(use_true_random=False))
def test_a_pool_of_hardly_more_than_the_largest_prompt(name: str, lengths: list[int], dice: Any) -> None:
    """1.2 times it: nobody waits for blocks of somebody who waits for theirs."""
    columns = -(-12 * max(lengths) // 640) + 1
    config = ViewConfig(2, 6, 6 * columns, 4, 2048)
    requests = [
        SimRequest(
            f"r{i}", dice.random() / 20, n, dice.randint(1, 20), ttft_slo_s=dice.choice([1e-3, 0.05, None]),
            priority=dice.choice([0, -1])
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    mix = Mix(config, NAMES[name](), tuple(requests))
    play(mix)
    all_are_served(mix)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do_is_an_empty_plan(name: str) -> None:
    config = ViewConfig(2, 4, 40, 2, 64)
    assert Mix(config, NAMES[name](), ()).policy().step(0.0, [], View.start(config)) == Plan()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, {"ageing_s": value}) for name in NAMES for value in (-1.0, float("nan"), float("inf"))),
        ("sarathi", {"token_budget": 1}),
        *(("layered", {key: 0}) for key in ("stage_tokens", "num_stages", "max_tokens")),
        *(("flowprefill", {key: -1}) for key in ("decode_every_ms", "slo_factor", "batch_tokens", "max_parked")),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{name}: {next(iter(wrong))}=.*; give"):
        NAMES[name](**wrong)


def events(steps: list[Step], kind: type[Event]) -> list[Any]:
    return [event for step in steps for event in step.events if isinstance(event, kind)]


def test_the_mixes_do_what_they_claim() -> None:
    """Preemption, yields and prompts that share a unit are common enough for the laws to mean something."""
    found: Counter[str] = Counter()
    for seed in range(60):
        steps = play(make_mix(Random(seed), 8, 70, "flowprefill"))
        found["preempted"] += len(events(steps, Preempted))
        found["parked"] += sum(live.state == "yielded" for step in steps for live in step.view.units.values()) > 0
        found["shared"] += any(len(s.unit.segments) > 1 and s.unit.yield_at != "none" for s in stretches(steps))
        mix = make_mix(Random(seed), 8, 70, "layered")
        found["groups"] += any(step.plan.memo.get("groups", 1) > 1 for step in play(mix))
    assert min(found.values()) > 5 and len(found) == 4, found
