"""Every method, and every pair of methods that may work together, keeps the contract; pairs that may not say why."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from firstlight.core import registry
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, Cut, Keep, Obs, PartContext, RequestRows, Retention, RowPolicy
from firstlight.core.registry import Method
from firstlight.core.schedule import WorkUnit
from firstlight.engine.engine import Engine, LiveUnit
from firstlight.engine.work import Stop
from firstlight.evaluate.contract import checks, run, schedule_checks
from firstlight.evaluate.trial import LAYERS, Broken, Subject, drain, some_prompts, submit
from tests.path.method_runs import OTHER_SETTINGS

NAMES = registry.names()
SCHEDULES = registry.names(schedules=True)
PAIRS = list(itertools.combinations(NAMES, 2))
ALLOWED = [pair for pair in PAIRS if registry.conflict(*pair) is None]
CHECKS, FEW = checks(), ("any schedule gives the same", "nothing is left behind", "blocks given back aren't read")
OF_PAIRS = CHECKS if os.environ.get("HYPOTHESIS_PROFILE") == "long" else FEW
"""What a pair is checked for each time; the rest with `make test-all`."""

SMALL: dict[str, dict[str, int]] = {
    "sarathi": {"token_budget": 64},
    "layered": {"stage_tokens": 16},
    "flowprefill": {"decode_every_ms": 1},
}
"""Settings under which a schedule cuts and stops prompts of some hundred tokens."""


def subject(*names: str, schedule: str = "sarathi") -> Subject:
    return Subject(tuple(Method(name) for name in names), Method(schedule, **SMALL[schedule]))


PLANNERS = [name for name in NAMES if "attention" in registry.classes(name)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_keeps_the_contract(name: str, check: str) -> None:
    run(CHECKS[check], subject(name))


@pytest.mark.parametrize("check", [*FEW, "alone as in any batch", "prompts of awkward lengths"])
@pytest.mark.parametrize("text", OTHER_SETTINGS)
def test_other_settings_keep_the_contract(text: str, check: str) -> None:
    run(CHECKS[check], Subject((Method.parse(text),)))


@pytest.mark.parametrize("text", [*PLANNERS, *OTHER_SETTINGS])
def test_a_planner_acts_where_it_is_checked(text: str) -> None:
    """So that no check holds because everything stayed dense."""
    engine = Subject((Method.parse(text),)).acting().engine()
    (live,), _ = submit(engine, some_prompts(11, (300,)))
    drain(engine)
    assert live.planned > 0 and 0 < live.stats.visible < live.stats.dense


@pytest.mark.parametrize("check", OF_PAIRS)
@pytest.mark.parametrize("pair", ALLOWED, ids="+".join)
def test_a_pair_keeps_the_contract(pair: tuple[str, str], check: str) -> None:
    run(CHECKS[check], subject(*pair))


@pytest.mark.parametrize(
    "pair", [p for p in ALLOWED if all("attention" in registry.classes(name) for name in p)], ids="+".join
)
def test_planners_of_prompts_are_asked_of_prompts_beside_one_of_all_tokens(pair: tuple[str, str]) -> None:
    run(CHECKS["generated tokens stay dense"], subject(*pair))


@pytest.mark.parametrize("check", schedule_checks())
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_every_schedule_serves_every_method(name: str, schedule: str, check: str) -> None:
    run(schedule_checks()[check], subject(*([] if name == "dense" else [name]), schedule=schedule))


def test_beside_a_stream_prompts_wait_half_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is checked there is checked of prompts between two groups of layers, and of units that were stopped."""
    heights, yielded, take, wait = set[int](), list[int](), Engine._submit, Engine._wait

    def submitted(engine: Engine, unit: WorkUnit) -> None:
        heights.update(end - first for first, end in (s.layer for s in unit.segments if s.kind == "prefill"))
        take(engine, unit)

    def waits(engine: Engine, live_unit: LiveUnit, stop: Stop) -> None:
        yielded.append(live_unit.unit.uid)
        wait(engine, live_unit, stop)

    monkeypatch.setattr(Engine, "_submit", submitted)
    monkeypatch.setattr(Engine, "_wait", waits)
    check = schedule_checks()["beside a running stream"]
    run(check, subject(schedule="flowprefill"))
    assert yielded and heights == {LAYERS}
    run(check, subject(schedule="layered"))
    assert min(heights) < LAYERS


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in ALLOWED], ids="+".join)
def test_a_refused_pair_names_both_and_says_why(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError) as refused:
        registry.make_parts([Method(name) for name in pair])
    assert all(name in str(refused.value) for name in pair) and "; " in str(refused.value)
    assert str(registry.conflict(*pair)) in str(refused.value)


def test_a_method_is_given_once() -> None:
    with pytest.raises(UserError, match="band is given twice"):
        registry.make_parts([Method("band"), Method("band", sink=4)])


# --- the checks find what they are for --------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoSettings:
    pass


class Part:
    Config: ClassVar = NoSettings
    identity: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: NoSettings) -> None:
        pass


class ByChunk(Part, RowPolicy):
    """Cuts by what is in the chunk, and says that chunks don't matter."""

    capability = Capability(exact=False, prefix_stable=False)

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        return None if layer != 1 or ctx.decode else Cut(keep=rows.tok[len(rows.tok) // 2 :])


class ByNeighbour(Part, RowPolicy):
    """Remembers who came last."""

    capability = Capability(exact=False, prefix_stable=False)
    last = 0

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        if layer != 1 or ctx.decode:
            return None
        mine, self.last = self.last, ctx.prompt_len
        return Cut(keep=rows.tok[rows.tok % 2 == mine % 2])


class Impatient(Part, RowPolicy):
    """Can't do with short prompts."""

    capability = Capability(exact=False, prefix_stable=False)

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        return None if ctx.decode or ctx.prompt_len > 8 else Cut(keep=rows.tok[[100]])


class Forgetful(Part, Retention):
    """Drops the prompt's cells though what it calls identity is dense."""

    capability = Capability(exact=False, alters_cells=False)

    def after_layer(
        self, layer: int, tok: Tensor, length: Sequence[int], obs: Obs | None, ctx: PartContext
    ) -> Keep | None:
        return Keep([torch.arange(n // 2, n) for n in length])


@pytest.mark.parametrize(
    ("part", "seam", "check", "said"),
    [
        (ByChunk, "tokens", "any schedule gives the same", "differs from one shot"),
        (ByNeighbour, "tokens", "alone as in any batch", "differs from alone"),
        (Impatient, "tokens", "prompts of awkward lengths", "fell back to dense"),
        (Forgetful, "cache", "identity settings are dense", "differs from dense"),
    ],
)
def test_a_method_that_breaks_its_word_is_found(
    part: type[Part], seam: str, check: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SimpleNamespace(load=lambda: part)
    known = registry._entries()
    monkeypatch.setattr(registry, "_entries", lambda: known | {"planted": {seam: entry}})
    with pytest.raises(Broken, match=said):
        run(CHECKS[check], subject("planted"))
    holding = [name for name in CHECKS if name in ("nothing is left behind", "blocks given back aren't read")]
    for name in holding if part is not Impatient else []:
        run(CHECKS[name], subject("planted"))
