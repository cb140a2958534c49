"""The View: a fold that agrees with the machine, changes nothing it was given, and forgets what is gone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from mixes import Mix, Recorder, mixes

from firstlight.core.schedule import (
    Admitted,
    Arrival,
    Cancel,
    Cancelled,
    Cut,
    NotAdmitted,
    Plan,
    Preempted,
    Segment,
    UnitDone,
    UnitYielded,
    WorkUnit,
)
from firstlight.core.view import View, ViewConfig
from firstlight.simulate.executor import SimExecutor, run

CONFIG = ViewConfig(num_layers=3, blocks_per_column=6, total_blocks=600, max_num_seqs=4, max_num_batched_tokens=64)


@dataclass
class Auditor(Recorder):
    """Compares the view with the machine itself at every step: nothing is missing, nothing slipped past the events."""

    executor: SimExecutor | None = None

    def step(self, now, events, view):
        assert self.executor is not None
        assert view.free_blocks == self.executor.free
        for request in view.requests.values():
            truth, held = self.executor.requests[request.rid], self.executor._held.get(request.rid)
            assert (request.arrival, request.n_known) == (pytest.approx(truth.at, abs=0.021), truth.n_known)
            assert (request.state == "running") <= (held is not None)
            if held is not None and request.state == "running":
                assert list(request.f) == held.f
                assert list(request.f) == sorted(request.f, reverse=True)
        live = {uid: [s.rid for s in unit.segments] for uid, unit in self.executor._live.items()}
        assert {uid: [s.rid for s in unit.unit.segments] for uid, unit in view.units.items()} == live
        return super().step(now, events, view)


@settings(max_examples=60)
@given(mixes())
def test_the_fold_is_the_truth(mix: Mix) -> None:
    executor = mix.executor()
    last = run(Auditor(mix.policy(), executor=executor), executor)
    assert not last.requests and not last.units and last.free_blocks == mix.config.total_blocks


@settings(max_examples=20)
@given(mixes(max_requests=4))
def test_views_stay_as_they_were(mix: Mix) -> None:
    """A policy may keep a view; later folds must not reach into it."""
    spelled: list[tuple[View, str]] = []

    class Keeper(Recorder):
        def step(self, now, events, view):
            spelled.append((view, repr(view)))
            return super().step(now, events, view)

    run(Keeper(mix.policy()), mix.executor())
    assert all(repr(view) == then for view, then in spelled)


def arrived(**facts) -> View:
    return View.start(CONFIG).after(1.5, [Arrival("a", 100, 100, 12, 8, **facts)])


def running(n_cached: int = 0) -> View:
    return arrived().after(2.0, [Admitted("a", n_cached, free_blocks=588)])


def after_unit(view: View, *segments: Segment, sampled: int = 0, grow: int = 0) -> View:
    unit = WorkUnit(view.next_uid, segments)
    done = UnitDone(unit.uid, 0.25, {"a": sampled}, {"a": grow}, free_blocks=588)
    return view.after_plan(Plan(submit=(unit,))).after(3.0, [done])


def test_a_request_from_arrival_to_its_first_token() -> None:
    view = arrived(priority=2)
    assert (view.requests["a"].state, view.requests["a"].arrival, view.step) == ("waiting", 1.5, 1)
    view = view.after_plan(Plan(admit=("a",), memo={"k": 1}))
    assert (view.requests["a"].state, view.memo) == ("admitting", {"k": 1})
    view = view.after(2.0, [Admitted("a", 64, free_blocks=588)])
    assert (view.requests["a"].state, view.requests["a"].f, view.free_blocks) == ("running", (64, 64, 64), 588)
    view = after_unit(view, Segment("a", "prefill", (64, 100), (0, 2)))
    assert (view.requests["a"].f, view.requests["a"].is_prefilling) == ((100, 100, 64), True)
    view = after_unit(view, Segment("a", "prefill", (64, 100), (2, 3)), sampled=1, grow=6)
    request = view.requests["a"]
    assert (request.f, request.n_known, request.grow, request.is_decoding) == ((100,) * 3, 101, 6, True)
    assert (view.last_s, view.last.uid, view.next_uid) == (0.25, 1, 2)
    view = view.after_plan(Plan(submit=(WorkUnit(2, (Segment("a", "decode", (100, 101), (0, 3)),)),)))
    assert (view.free_blocks, view.requests["a"].grow) == (582, 0)
    view = view.after(4.0, [UnitDone(2, 0.1, {"a": 1}, {}, ("a",), free_blocks=600)])
    assert not view.requests and not view.units


def test_recompute_keeps_the_tokens_and_park_keeps_the_cells() -> None:
    view = after_unit(running(), Segment("a", "prefill", (0, 100), (0, 3)), sampled=1)
    lost = view.after(3.0, [Preempted("a", "recompute", 18, free_blocks=600)]).requests["a"]
    assert (lost.state, lost.f, lost.n_known, lost.need_blocks) == ("preempted", (0, 0, 0), 101, 18)
    view = view.after(3.0, [Preempted("a", "park", free_blocks=588)])
    assert (view.requests["a"].state, view.requests["a"].need_blocks) == ("parked", 0)
    assert view.after(4.0, [NotAdmitted("a", 0, free_blocks=588)]).requests["a"].state == "parked"
    back = view.after_plan(Plan(admit=("a",))).after(4.0, [Admitted("a", 0, free_blocks=588)]).requests["a"]
    assert (back.state, back.f, back.is_decoding) == ("running", (100,) * 3, True)


def test_a_refused_admission_waits_again_with_the_engines_figure() -> None:
    view = arrived().after_plan(Plan(admit=("a",))).after(2.0, [NotAdmitted("a", 18, free_blocks=5)])
    assert (view.requests["a"].state, view.requests["a"].need_blocks, view.free_blocks) == ("waiting", 18, 5)


def test_what_leaves_a_unit_no_longer_counts() -> None:
    """A preempted request that is admitted again must not get the cells of the pass it left."""
    unit = WorkUnit(0, (Segment("a", "prefill", (0, 50), (0, 3)),))
    view = running().after_plan(Plan(submit=(unit,)))
    view = view.after(3.0, [Preempted("a", "recompute", 12, free_blocks=600), Admitted("a", 0, free_blocks=588)])
    assert view.units[0].unit.segments == ()
    view = view.after(4.0, [UnitDone(0, 0.1, {"a": 1}, free_blocks=588)])
    assert (view.requests["a"].f, view.requests["a"].n_generated) == ((0, 0, 0), 0)


def test_a_yielded_unit_leaves_with_its_last_request() -> None:
    """Whether or not the engine says so, nobody may wait for it."""
    unit = WorkUnit(0, (Segment("a", "prefill", (0, 100), (0, 3)),), "slice")
    view = running().after_plan(Plan(submit=(unit,))).after(2.5, [UnitYielded(0, (1, "mlp"), 0.5, free_blocks=588)])
    view = view.after(3.0, [Preempted("a", "recompute", 12, free_blocks=600)])
    assert not view.units
    assert view.after(3.0, [UnitDone(0, 0.0, free_blocks=600)]).requests["a"].state == "preempted"


def test_cancelled_is_final() -> None:
    view = arrived().after(2.0, [Cancel("a"), Admitted("a", 0, free_blocks=588)])
    assert view.requests["a"].state == "cancelled"
    view = view.after(3.0, [Cancelled("a", free_blocks=600)])
    assert not view.requests and view.free_blocks == 600
    late = [Cancel("a"), Admitted("a", 0, free_blocks=600), Preempted("a", "park", free_blocks=600)]
    assert not view.after(4.0, late).requests


def test_yield_and_resume_add_up() -> None:
    unit = WorkUnit(0, (Segment("a", "prefill", (0, 100), (0, 3)),), "slice")
    view = running().after_plan(Plan(submit=(unit,)))
    view = view.after(2.5, [UnitYielded(0, (1, "attend"), 0.5, free_blocks=588)])
    assert (view.units[0].state, view.units[0].executed_s, view.last, view.last_s) == ("yielded", 0.5, unit, 0.5)
    view = view.after(3.0, []).after_plan(Plan(resume=(0,)))
    assert (view.units[0].state, view.units[0].started) == ("running", 3.0)
    view = view.after(3.25, [UnitYielded(0, (2, "mlp"), 0.25, free_blocks=588)])
    assert (view.units[0].executed_s, view.last_s) == (0.75, 0.25)


def test_a_request_with_two_segments_in_a_unit_samples_once() -> None:
    """At most one of them ends at the top layer."""
    view = after_unit(running(), Segment("a", "prefill", (0, 100), (0, 2)))
    view = after_unit(view, Segment("a", "prefill", (0, 50), (2, 3)))
    unit = Segment("a", "prefill", (50, 100), (2, 3)), Segment("a", "prefill", (100, 101), (0, 1))
    assert after_unit(view, *unit, sampled=1).requests["a"].n_generated == 1


def test_a_cut_tells_the_rows_alive() -> None:
    request = running().after(3.0, [Cut("a", 1, (20, 36), 44, free_blocks=588, parked_bytes=7)]).requests["a"]
    assert (request.cut_layer, request.kept) == (1, (20, 36))


def test_dice_follow_seed_and_step() -> None:
    view = View.start(CONFIG)
    assert view.rng.random() == view.rng.random() == View.start(CONFIG).rng.random()
    assert view.rng.random() != view.after(0.0, []).rng.random()
