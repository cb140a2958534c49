"""Random request mixes played through the schedules on a virtual clock; what several tests look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any

from hypothesis import strategies as st

from firstlight.core.schedule import Event, Plan, Policy, Segment, UnitDone, UnitYielded, WorkUnit
from firstlight.core.view import RequestView, View, ViewConfig
from firstlight.schedule.flowprefill import FlowPrefill, FlowPrefillConfig
from firstlight.schedule.layered import Layered, LayeredConfig
from firstlight.schedule.sarathi import Sarathi, SarathiConfig
from firstlight.simulate.executor import RowCost, SimExecutor, SimRequest, run

SLICE_S = 0.005
SCHEDULES: dict[type, type] = {SarathiConfig: Sarathi, LayeredConfig: Layered, FlowPrefillConfig: FlowPrefill}
NAMES = {"sarathi": SarathiConfig, "layered": LayeredConfig, "flowprefill": FlowPrefillConfig}


@dataclass(frozen=True)
class Mix:
    config: ViewConfig
    schedule: Any
    requests: tuple[SimRequest, ...]

    def policy(self) -> Any:
        return SCHEDULES[type(self.schedule)](self.schedule, self.config)

    def executor(self) -> SimExecutor:
        return SimExecutor(self.config, RowCost(cell_s=5e-5), self.requests, SLICE_S)


@dataclass(frozen=True)
class Step:
    now: float
    events: tuple[Event, ...]
    view: View
    plan: Plan


@dataclass
class Recorder:
    """A policy that remembers what it was asked and what it said."""

    policy: Policy
    steps: list[Step] = field(default_factory=list)

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan:
        plan = self.policy.step(now, events, view)
        self.steps.append(Step(now, tuple(events), view, plan))
        return plan


@dataclass(frozen=True)
class Stretch:
    """A unit at work from its submit or resume to its end or yield; `view` is that of the plan."""

    unit: WorkUnit
    dur: float
    view: View


def play(mix: Mix) -> list[Step]:
    recorder = Recorder(mix.policy())
    run(recorder, mix.executor())
    return recorder.steps


def stretches(steps: Sequence[Step]) -> list[Stretch]:
    """In the order in which they ran."""
    units: dict[int, WorkUnit] = {}
    begun: dict[int, View] = {}
    found = []
    for step in steps:
        for event in step.events:
            if isinstance(event, UnitDone | UnitYielded) and event.uid in begun:
                found.append(Stretch(units[event.uid], event.dur, begun.pop(event.uid)))
        units.update({unit.uid: unit for unit in step.plan.submit})
        begun.update(dict.fromkeys((*step.plan.resume, *(unit.uid for unit in step.plan.submit)), step.view))
    return found


def ready(step: Step) -> list[RequestView]:
    """Whom a new unit could hold."""
    busy = {s.rid for live in step.view.units.values() for s in live.unit.segments}
    return [r for r in step.view.requests.values() if r.state == "running" and r.rid not in busy]


def rows(segments: Sequence[Segment]) -> int:
    return sum(s.tok[1] - s.tok[0] for s in segments)


def mixes(max_requests: int = 8, max_output: int = 70, schedule: str = "sarathi") -> st.SearchStrategy[Mix]:
    """From a seed, not draw by draw: hypothesis leans to small cases, in which nothing ever has to give way."""
    return st.integers(0, 2**32).map(lambda seed: make_mix(Random(seed), max_requests, max_output, schedule))


def make_mix(dice: Random, max_requests: int, max_output: int, name: str = "sarathi") -> Mix:
    """Pools from roomy to hardly enough, so that preemption is common; cancels, barriers, hits and priorities."""
    num_layers = dice.choice([2, 4])
    columns = dice.choice([dice.randint(4, 6), dice.randint(5, 24)])
    config = ViewConfig(
        num_layers=num_layers,
        blocks_per_column=3 * num_layers,
        total_blocks=3 * num_layers * columns,
        max_num_seqs=dice.choice([1, 4, 6, 6]),
        max_num_batched_tokens=dice.choice([200, 2048]),
        schedule={"name": name, "settings": {}},
    )
    schedule = make_schedule(dice, name)
    n = dice.randint(1, max_requests)
    return Mix(config, schedule, tuple(make_request(dice, f"r{i}", config, max_output) for i in range(n)))


def make_schedule(dice: Random, name: str) -> Any:
    """Settings of a schedule, far from the defaults: the mixes are small."""
    ageing_s = dice.choice([0.0, 0.2, 5.0])
    if name == "layered":
        return LayeredConfig(
            dice.choice([16, 64, 512]), dice.choice([1, 3, 16]), dice.choice([50, 300, 8192]), ageing_s
        )
    if name == "flowprefill":
        every, factor = dice.choice([0.0, 5.0, 40.0]), dice.choice([0.0, 1.0, 4.0])
        return FlowPrefillConfig(every, factor, dice.choice([60, 300, 2048]), dice.choice([0, 1, 4]), ageing_s)
    return SarathiConfig(dice.choice([16, 64, 512]), ageing_s, dice.random() < 0.7)


def make_request(dice: Random, rid: str, config: ViewConfig, max_output: int) -> SimRequest:
    room = config.total_blocks // config.blocks_per_column * config.block_size
    n_output = dice.choice([1, dice.randint(1, max_output), max_output])
    n_tokens = dice.choice([dice.randint(1, room - n_output), dice.randint(1, 100), dice.randint(30, 63)])
    at = dice.choice([0.0, dice.random() / 5, dice.random() / 2])
    return SimRequest(
        rid,
        at,
        n_tokens,
        n_output,
        n_hit=dice.choice([0, 0, n_tokens - 1, n_tokens // 2]),
        cancel_at=dice.choice([inf, inf, inf, inf, inf, at, at + 0.01, at + dice.random() / 2]),
        whole_prompt=dice.random() < 0.15,
        chunk=dice.choice([None, None, None, 50]),
        barriers=dice.choice([(), (), (0,), (0, config.num_layers - 2)]),
        priority=dice.choice([0, 0, 1, -1]),
        ttft_slo_s=dice.choice([None, None, 0.01, 0.1, 0.1, dice.random()]),
    )
