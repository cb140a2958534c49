"""The cost guard and the rows that stay dense: what becomes of a plan in an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from firstlight.attention.band import Band, BandConfig
from firstlight.attention.grid import Grid
from firstlight.core import registry
from firstlight.core.attn import DENSE, PlanContext
from firstlight.core.parts import Capability, Probe, Retention
from firstlight.core.registry import Method
from firstlight.engine import costs
from firstlight.engine.costs import Costs, measure
from firstlight.engine.planning import Planning
from firstlight.engine.report import report
from firstlight.evaluate.trial import MODEL, Subject, answers, asking, drain, some_prompts
from firstlight.kernels.dispatch import backend
from tests.tiny import tiny_engine

CHEAP = Costs(dense=1.0, block=1.0, column=2.0, operation=1e-9)


class Looking(Band):
    """A band that claims to have looked at something."""

    asked: ClassVar[list[int]] = []
    capability = Capability(exact=False, looks=True)

    def plan(self, ctx: PlanContext):  # type: ignore[no-untyped-def]
        self.asked.append(ctx.layer)
        return super().plan(ctx)

    def operations(self, ctx: PlanContext) -> float:
        return 1.0


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Subject:
    known = registry._entries()
    entry = SimpleNamespace(load=lambda: Looking)
    monkeypatch.setattr(registry, "_entries", lambda: known | {"looking": {"attention": entry}})
    Looking.asked.clear()
    return Subject((Method("looking", sink=0, window=64),))


@pytest.mark.parametrize(
    ("cost", "asked", "used"),
    [
        (CHEAP, True, True),
        (Costs(dense=1.0, block=1.0, column=1.0, operation=1e9), False, False),
        (Costs(dense=1.0, block=1e9, column=1e9, operation=0.0), True, False),
    ],
    ids=["pays", "planning is dear", "reading is dear"],
)
def test_a_plan_that_would_not_pay_is_left_aside(looking: Subject, cost: Costs, asked: bool, used: bool) -> None:
    engine, prompts = looking.engine(), some_prompts(1, (300,))
    machine = engine.machine
    machine.planning = Planning(machine.planning.digests, cost)
    live = engine.add(asking("r0", prompts["r0"], rows := []))
    drain(engine)
    assert bool(Looking.asked) == asked
    said = report(live, engine.parts)
    (method,) = said["methods"]
    assert method["used"] == used and (said["attention"]["density"] < 1) == used
    dense = answers(Subject(()).engine(), prompts)["r0"]
    if not used:
        assert "would not have paid" in method["why"]
        assert all(torch.equal(a, b) for a, b in zip(rows, dense))


def test_layers_with_a_window_are_not_planned(looking: Subject) -> None:
    """Of three layers the last is global."""
    engine = tiny_engine("gemma3", 3, method=looking.methods, deterministic=True, prefix_cache="off")
    live = engine.add(asking("r0", some_prompts(1, (300,))["r0"], []))
    drain(engine)
    assert set(Looking.asked) == {2} and live.planned > 0


def test_costs_are_predicted_from_lists() -> None:
    """One second each: dense rows cost whole blocks up to their own, blocks their entries, columns twice."""
    tok, heads = torch.arange(256, 512), 3
    ctx = PlanContext(0, torch.zeros(256, heads, 16), tok, tok, 1, 512, True, lambda: torch.zeros(1, 512, 16), {}, tok)
    grid = Grid(ctx, 128, 64)
    whole = CHEAP.of(grid.plan(band=(0, DENSE)), ctx)
    assert CHEAP.densely(ctx) <= whole <= CHEAP.densely(ctx) + 256 * 64 * heads
    blocks = torch.zeros(heads, grid.tiles, grid.num_blocks, dtype=torch.bool)
    blocks[:, :, :2] = True
    assert CHEAP.of(grid.plan(blocks=blocks), ctx) == 256 * 128 * heads
    columns = torch.zeros(heads, grid.tiles, 512, dtype=torch.bool)
    columns[0, :, [5, 70, 200]] = True
    assert CHEAP.of(grid.plan(columns=columns), ctx) == 256 * 3 * 2
    planner = Band(BandConfig(sink=64, window=64))
    plan = planner.plan(ctx)
    assert plan is not None and CHEAP.of(plan, ctx) == 256 * (64 + 64 + 64) * heads


def test_costs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Looking(BandConfig())
    found = measure(backend("torch"), MODEL, looking, torch.float32)
    assert min(found.dense, found.block, found.column, found.operation) > 0
    monkeypatch.setattr(Looking, "rehearse", lambda self, ctx: 1e18)
    assert measure(backend("torch"), MODEL, looking, torch.float32).operation < found.operation / 100


@given(begins=st.floats(0, 30), lasts=st.floats(0, 18))
def test_a_disturbance_changes_no_cost(begins: float, lasts: float) -> None:
    """Something that makes all slower for up to half of the time that measuring takes undisturbed."""
    with mock.patch.object(costs, "time") as clock:
        now = 0.0
        clock.perf_counter.side_effect = lambda: now

        def call(seconds: float) -> None:
            nonlocal now
            now += seconds * (5 if begins <= now < begins + lasts else 1)

        assert costs._shortest(lambda: call(1.0), lambda: call(2.0)) == pytest.approx([1.0, 2.0])


class Summing(Retention):
    """Keeps all, and the sums over the last rows in the first layer."""

    Config = BandConfig
    capability = Capability(exact=True, alters_cells=False)
    seen: ClassVar[list[torch.Tensor]] = []

    def __init__(self, config: BandConfig) -> None:
        pass

    def probe(self, layer: int) -> Probe | None:
        return Probe(4) if layer == 0 else None

    def after_layer(self, layer: int, tok, length, obs, ctx) -> None:  # type: ignore[no-untyped-def]
        if layer == 0:
            self.seen.append(obs.colsum.clone())


def test_rows_that_are_summed_see_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry._entries()
    entry = SimpleNamespace(load=lambda: Summing)
    monkeypatch.setattr(registry, "_entries", lambda: known | {"summing": {"cache": entry}})
    prompts, alone = some_prompts(3, (300,)), Subject((Method("summing"),))
    for subject in (alone, Subject((*alone.methods, Method("band", sink=0, window=20)))):
        answers(subject.engine(), prompts)
    without, within = Summing.seen
    assert torch.equal(without, within) and bool((without > 0).all())


@pytest.mark.parametrize("cost", [Costs(1.0, 1.0, 1.0, 1e9), Costs(1.0, 1e9, 1e9, 0.0)], ids=["planning", "reading"])
def test_streaming_heads_stay_what_they_are_where_another_plan_would_not_pay(cost: Costs) -> None:
    """Their middle is gone by then, so that dense would read nothing's K/V."""
    prompts = some_prompts(2, (400,))
    alone = Subject((Method("duoattention"),)).acting()
    both = replace(alone, methods=(*alone.methods, *Subject((Method("xattention"),)).acting().methods))
    engine = both.engine()
    engine.machine.planning = Planning(engine.machine.planning.digests, cost)
    engine.on_stop = lambda *_: engine.pool.poison()
    got, want = answers(engine, prompts)["r0"], answers(alone.engine(), prompts)["r0"]
    assert all(torch.equal(a, b) for a, b in zip(got, want))
