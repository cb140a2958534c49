"""Replay: a fresh policy gets a log's config and events, nothing else, and must make the same plans byte by byte.

If it does, no fact reached the logged policy beside the events, and what is simulated is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from firstlight.core.schedule import Policy
from firstlight.core.view import View, ViewConfig
from firstlight.engine.eventlog import canonical, read_log

MakePolicy = Callable[[ViewConfig], Policy]


@dataclass(frozen=True)
class Difference:
    """The first step whose plans differ; `replayed` says what was raised if there is no plan."""

    step: int
    logged: str
    replayed: str

    def __str__(self) -> str:
        return f"step {self.step} differs\n  logged:   {self.logged}\n  replayed: {self.replayed}"


@dataclass(frozen=True)
class Replay:
    """What a replay found."""

    steps: int
    difference: Difference | None


def replay(path: str | Path, make_policy: MakePolicy) -> Replay:
    """Compares every plan of a log up to the first difference. Raises UserError if the log can't be trusted."""
    config, steps = read_log(path)
    policy, view = make_policy(config), View.start(config)
    for number, step in enumerate(steps, start=1):
        try:
            view = view.after(step.now, step.events)
            plan = policy.step(step.now, step.events, view)
            again = canonical(plan)
            view = view.after_plan(plan)
        except Exception as error:
            # A policy from outside may raise anything; it made no such plan.
            again = f"{type(error).__name__}: {error}"
        if again != step.plan:
            return Replay(number, Difference(number, step.plan, again))
    return Replay(len(steps), None)
