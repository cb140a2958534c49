"""`layered`: groups of layers, closed batches, and decodes in every unit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from mixes import Mix, Step, mixes, play, rows, stretches

from firstlight.core.schedule import Admitted, Arrival, Plan, Preempted, Segment, UnitDone
from firstlight.core.view import View, ViewConfig
from firstlight.schedule.layered import Layered, LayeredConfig
from firstlight.simulate.executor import SimRequest

LAYERS = 12


def mix_of(*requests: SimRequest, columns: int = 400, max_num_seqs: int = 8, **settings: float) -> Mix:
    config = ViewConfig(LAYERS, LAYERS, LAYERS * columns, max_num_seqs, 4096)
    return Mix(config, LayeredConfig(**settings), requests)


def prompts_of(steps: list[Step]) -> list[list[Segment]]:
    """The prefill segments of each unit that has some."""
    units = [[s for s in unit.segments if s.kind == "prefill"] for step in steps for unit in step.plan.submit]
    return [segments for segments in units if segments]


def groups_of(steps: list[Step], rid: str) -> list[tuple[int, int]]:
    return [s.layer for segments in prompts_of(steps) for s in segments if s.rid == rid]


def stream() -> SimRequest:
    return SimRequest("stream", 0.0, 1, 400)


@pytest.mark.parametrize(
    ("tokens", "stages", "sizes"),
    [
        (1, 16, [12]),
        (512, 16, [12]),
        (513, 16, [6, 6]),
        (2048, 16, [3, 3, 3, 3]),
        (2049, 16, [3, 3, 2, 2, 2]),
        (8000, 16, [1] * 12),
        (8000, 5, [3, 3, 2, 2, 2]),
        (8000, 1, [12]),
    ],
)
def test_one_group_for_512_tokens(tokens: int, stages: int, sizes: list[int]) -> None:
    """The longer ones first, as in the paper's code; never more groups than layers."""
    steps = play(mix_of(stream(), SimRequest("a", 0.01, tokens, 1), num_stages=stages))
    groups = groups_of(steps, "a")
    assert [end - first for first, end in groups] == sizes
    assert groups[0][0] == 0 and groups[-1][1] == LAYERS and all(a[1] == b[0] for a, b in pairwise(groups))


def test_nobody_to_spare_is_one_group() -> None:
    assert groups_of(play(mix_of(SimRequest("a", 0.0, 8000, 3))), "a") == [(0, LAYERS)]


def test_a_units_rows_follow_the_engines_limit() -> None:
    """`--max-num-batched-tokens` bounds what a unit costs here too."""
    mix = mix_of(stream(), SimRequest("a", 0.01, 1000, 1))
    few = Mix(ViewConfig(LAYERS, LAYERS, LAYERS * 400, 8, 100), mix.schedule, mix.requests)
    assert len(groups_of(play(few), "a")) == 10


def test_a_batch_is_closed_and_takes_what_fits() -> None:
    """The third is cut, goes on in the next batch, and who comes meanwhile waits until then."""
    prompts = [SimRequest(f"p{i}", 0.01, 1000, 1) for i in range(3)]
    late = SimRequest("urgent", 0.05, 100, 1, priority=-5)
    steps = play(mix_of(stream(), *prompts, late, max_tokens=2500))
    batches = [{s.rid: s.tok for s in segments} for segments in prompts_of(steps)]
    first = {"p0": (0, 1000), "p1": (0, 1000), "p2": (0, 500)}
    assert batches[0] == {"stream": (0, 1)} and batches[1:6] == [first] * 5
    assert batches[6:] == [{"urgent": (0, 100), "p2": (500, 1000)}] * 2


@settings(max_examples=60)
@given(mixes(schedule="layered"))
def test_every_batch_goes_up_together(mix: Mix) -> None:
    """One range of layers a unit, at most `max_tokens` rows or one prompt that can't be cut; all decodes beside it."""
    for step in play(mix):
        for unit in step.plan.submit:
            prompts = [s for s in unit.segments if s.kind == "prefill"]
            whole = [s for s in prompts if step.view.requests[s.rid].whole_prompt]
            assert rows(prompts) <= mix.schedule.max_tokens or (len(prompts) == 1 and prompts == whole)
            groups = step.plan.memo.get("groups", 1)
            if prompts and groups > 1:
                assert max(l1 - l0 for l0, l1 in (s.layer for s in prompts)) <= -(-mix.config.num_layers // groups)
            assert unit.yield_at == "none"


def test_a_stream_waits_for_a_groups_time_at_most() -> None:
    watched = stream()
    steps = play(mix_of(watched, SimRequest("long", 0.05, 8000, 1)))
    gaps = [b - a for a, b in pairwise(watched.token_at)]
    longest = max(s.dur for s in stretches(steps))
    assert max(gaps) <= longest + 1e-9 and len(groups_of(steps, "long")) == LAYERS


def test_who_leaves_between_two_groups_leaves_the_batch() -> None:
    gone, stays = SimRequest("gone", 0.01, 2000, 1, cancel_at=0.1), SimRequest("stays", 0.01, 2000, 1)
    steps = play(mix_of(stream(), gone, stays))
    units = prompts_of(steps)
    assert len(groups_of(steps, "gone")) < len(groups_of(steps, "stays")) == 8
    assert [s.rid for s in units[-1]] == ["stays"] and len(stays.token_at) == 1


def test_who_was_preempted_and_is_back_at_once_starts_again() -> None:
    """Also when the answer to its preemption is its admission: the memo of that step still names it."""
    config = ViewConfig(4, 4, 400, 4, 4096)
    policy = Layered(LayeredConfig(stage_tokens=10), config)
    view = View.start(config).after(0.0, [Arrival("s", 1, 1, 4, 9), Arrival("a", 40, 40, 4, 1)])
    view = view.after(0.0, [Admitted("s", 0, free_blocks=1), Admitted("a", 0, free_blocks=1)])
    view = view.after(0.0, [UnitDone(7, 0.1, free_blocks=1)])
    view = view.after_plan(policy.step(0.0, [], view))  # both prompts: nothing decodes, one group
    view = view.after(0.1, [UnitDone(0, 0.1, sampled={"s": 1, "a": 1}, finished=("a",), free_blocks=9)])
    view = view.after(0.1, [Arrival("b", 40, 40, 4, 1)]).after(0.1, [Admitted("b", 0, free_blocks=1)])
    plan = policy.step(0.1, [], view)
    assert plan.memo["groups"] == 4 and plan.submit[0].segments[0] == Segment("b", "prefill", (0, 40), (0, 1))
    view = view.after_plan(plan).after(0.2, [UnitDone(1, 0.1, sampled={"s": 1}, free_blocks=9)])
    again = [Preempted("b", "recompute", 4, free_blocks=9)]
    plan = policy.step(0.2, again, view.after(0.2, again))
    assert plan.admit == ("b",)
    view = view.after(0.2, again).after_plan(plan).after(0.2, [Admitted("b", 0, free_blocks=1)])
    assert policy.step(0.2, [], view).submit[0].segments[0] == Segment("b", "prefill", (0, 40), (0, 1))


def test_a_batch_that_ends_below_its_last_group_is_over() -> None:
    """Its streams left meanwhile, so there is no unit to fill with them: the rest must not wait for one."""
    goes = SimRequest("stream", 0.0, 1, 400, cancel_at=0.06)
    rest = SimRequest("a", 0.01, 1000, 1, barriers=(1,), chunk=600)
    play(mix_of(goes, rest, stage_tokens=100))
    assert len(rest.token_at) == 1


def test_who_starts_again_is_not_taken_for_one_that_waits_above_a_barrier() -> None:
    """Its cells above the barrier are as untouched as those of a request that only was admitted."""
    config = ViewConfig(4, 4, 400, 4, 4096)
    view = View.start(config).after(0.0, [Arrival("a", 40, 40, 4, 1, barriers=(1,))])
    view = view.after(0.0, [Admitted("a", 0, free_blocks=1)])
    view = view.after_plan(Plan(memo={"cells": {"a": (0, 40, 2, 4)}, "next": 1, "groups": 2})).after(0.0, [])
    (unit,) = Layered(LayeredConfig(), config).step(0.0, [], view).submit
    assert unit.segments == (Segment("a", "prefill", (0, 40), (0, 4)),)


def test_barriers_and_chunks_go_in_groups_too() -> None:
    """A prompt that comes whole passes its barrier; one that is cut waits below it for the rest."""
    whole = play(mix_of(stream(), SimRequest("a", 0.01, 1000, 1, barriers=(2,)), num_stages=4, stage_tokens=250))
    assert groups_of(whole, "a") == [(0, 3), (3, 6), (6, 9), (9, 12)]
    requests = stream(), SimRequest("a", 0.01, 1000, 1, barriers=(4,), chunk=600)
    cut = [s for segments in prompts_of(play(mix_of(*requests, stage_tokens=300))) for s in segments if s.rid == "a"]
    assert [(s.tok, s.layer) for s in cut] == [
        ((0, 600), (0, 5)),
        ((600, 1000), (0, 5)),
        *(((0, 600), (first, end)) for first, end in [(5, 6), (6, 12)]),
        *(((600, 1000), (first, end)) for first, end in [(5, 6), (6, 12)]),
    ]
