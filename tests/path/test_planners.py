"""Every planner's plans are read as they are meant, in any legal schedule: each call against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core import registry
from firstlight.core.attn import AttnPlan
from firstlight.core.registry import Method
from firstlight.engine.engine import Engine
from firstlight.evaluate.trial import Subject, answers, some_prompts
from firstlight.kernels.contract import AttnCall, AttnStats
from firstlight.kernels.reference.attention import attend as reference
from tests.path.method_runs import OTHER_SETTINGS

PLANNERS = [name for name in registry.names() if "attention" in registry.classes(name)]
ROUNDING = 1e-4
"""Scores are that close to the reference's."""


class Mirror:
    """Asks the reference about every call with a plan that an engine makes."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.prompts = self.generated = 0
        """Calls with a plan."""
        self._ops: Any = engine.machine.ops
        self._attend, self._kept = self._ops.attend, dict[bytes, AttnPlan]()
        patch.setattr(self._ops, "attend", self._told)
        if hasattr(self._ops, "plan_numbers"):  # steps that are replayed keep their plans, and carry numbers alone
            self._numbers = self._ops.plan_numbers
            patch.setattr(self._ops, "plan_numbers", self._keep)

    def _keep(self, plan: AttnPlan | None) -> Any:
        numbers = self._numbers(plan)
        if plan is not None:
            self._kept[numbers.tobytes()] = plan
        return numbers

    def _told(self, call: AttnCall, r0: int, r1: int) -> None:
        numbers, before = call.numbers, call.stats.visible
        self._attend(call, r0, r1)
        plan = call.plan
        if plan is None and numbers is not None and numbers[1] is not None:
            plan = self._kept.get(numbers[1].tobytes())
        if plan is not None:
            self.prompts += not call.rows.decode[0]
            self.generated += call.rows.decode[0]
            with torch.utils._python_dispatch._disable_current_modes():  # nobody records what is done here
                agrees(call, plan, r0, r1, call.stats.visible - before)


def agrees(call: AttnCall, plan: AttnPlan, r0: int, r1: int, visible: int) -> None:
    """Rows [r0, r1), of which `visible` entries were read, are the reference's: where rows skip what is far below the
    best, at a threshold that is a little lower or a little higher."""
    wanted = [judged(call, each, r0, r1) for each in bounds(plan)]
    got = call.out[r0:r1]
    close = [torch.isclose(got, want.out[r0:r1], rtol=1e-5, atol=2e-5).all(-1) for want in wanted]
    assert bool(torch.stack(close).any(0).all())
    assert wanted[-1].stats.visible <= visible <= wanted[0].stats.visible


def bounds(plan: AttnPlan) -> list[AttnPlan]:
    if plan.skip_log is None:
        return [plan]
    return [replace(plan, skip_log=plan.skip_log + apart) for apart in (-ROUNDING, ROUNDING)]


def judged(call: AttnCall, plan: AttnPlan, r0: int, r1: int) -> AttnCall:
    out: Tensor = torch.full(call.q.shape, torch.nan)
    mirrored = replace(call, plan=plan, out=out, stats=AttnStats(), numbers=None, probe=None, lse=None)
    reference(mirrored, r0, r1)
    return mirrored


@pytest.mark.parametrize("text", [*PLANNERS, *OTHER_SETTINGS])
def test_every_call_agrees_with_the_reference(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Subject((Method.parse(text),)).acting().engine()
    (planner,) = [part.impl for part in engine.parts if part.seam == "attention"]
    mirror = Mirror(engine, monkeypatch)
    for chaos in (None, 1):
        answers(engine, some_prompts(3, (270, 90)), chaos=chaos)
    assert mirror.prompts > 0 and (mirror.generated > 0) == (not planner.prompt_only)
