"""Layers that are noted first and computed afterwards give the bits and the stops of those computed call by call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core import schedule as told
from firstlight.core.request import Request, SamplingParams
from firstlight.core.schedule import Event, Plan
from firstlight.core.view import View
from firstlight.engine.forward import Pass
from firstlight.engine.held import Held
from firstlight.engine.work import Stop, Work
from firstlight.kernels.native import lib
from firstlight.kernels.tape import Bell, Tape
from tests.tiny import VOCABULARY, tiny_engine

if lib is None:
    pytest.skip("no compiled kernels here", allow_module_level=True)

LAYERS = 4
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]


def run(
    family: str, holds: bool, slow: bool, cancel_at: int = -1, patience_s: float = 0.0, precision: str = "f32"
) -> tuple[dict[str, list[Tensor]], list[int]]:
    """Logits of three requests, and the layers at whose ends passes stopped. `slow`: passes stop inside layers."""
    engine = tiny_engine(family, LAYERS, schedule="sarathi:token_budget=96", precision=precision)
    machine, seen, stops = engine.machine, dict[str, list[Tensor]](), list[int]()
    machine.holds, machine.steady.most, engine.patience_s = holds, 0, patience_s
    if slow:
        machine.linear.per_second = machine.attention.per_second = 1e7

    def at_a_stop(work: Work, stop: Stop) -> None:
        if stop.level == "layer":
            stops.append(stop.layer)
            if len(stops) == cancel_at:
                engine.cancel("1")

    def noted(rid: str, logits: Tensor) -> int:
        seen.setdefault(rid, []).append(logits.clone())
        return int(logits.argmax())

    engine.on_stop = at_a_stop
    for i, length in enumerate((130, 70, 40)):
        ids = [(7 * j + i) % VOCABULARY for j in range(length)]
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        engine.add(Request(str(i), ids, params, choose=lambda _so_far, logits, rid=str(i): noted(rid, logits)))
    while engine.has_work:
        engine.step()
    assert engine.pool.used == 0
    return seen, stops


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each stretch the number of layers."""
    counts, inner = list[int](), Held.__init__

    def counted(held: Held, batch: Any, layers: range, *how: Any) -> None:
        inner(held, batch, layers, *how)
        counts.append(held.end - layers.start)

    monkeypatch.setattr(Held, "__init__", counted)
    return counts


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_noted_layers_are_as_others(family: str, slow: bool, noted: list[int]) -> None:
    want, stops = run(family, False, slow)
    assert not noted
    got, others = run(family, True, slow)
    assert others == stops
    assert got.keys() == want.keys() and all(torch.equal(torch.stack(got[r]), torch.stack(want[r])) for r in want)
    assert set(noted) == {LAYERS, *([1] if family == "gemma3" else [])}  # a window's blocks are freed in between


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_of_one_form_are_computed_once(family: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a layer has of its own moves: weights, gains, biases, centres, where K/V go and are read."""
    want, _ = run(family, False, False, precision=precision)
    computed, inner = list[int](), Pass._compute
    monkeypatch.setattr(Pass, "_compute", lambda p, layer, batch: computed.append(layer) or inner(p, layer, batch))
    got, _ = run(family, True, False, precision=precision)
    assert set(computed) == {0}
    assert got.keys() == want.keys() and all(torch.equal(torch.stack(got[r]), torch.stack(want[r])) for r in want)


@pytest.mark.parametrize("schedule", ["layered:stage_tokens=32", "flowprefill", "sarathi"])
def test_books_of_repeated_layers(schedule: str) -> None:
    """Rows computed and keys read are counted in each layer, however its calls came about."""
    reports = []
    for holds in (False, True):
        engine = tiny_engine("llama", LAYERS, schedule=schedule)
        engine.machine.holds = holds
        live = engine.add(Request("0", list(range(1, 100)), SamplingParams(max_tokens=2, ignore_eos=True)))
        while engine.has_work:
            engine.step()
        reports.append((live.computed, live.stats.dense, live.stats.visible, live.kv.peak_nbytes))
    assert reports[0] == reports[1] and reports[0][0] == [99] * LAYERS


def test_another_pace_cuts_layers_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first guess, or a machine that slows down, doesn't size a whole pass."""
    for limit in ("_MOST_CALLS", "_FEW_CALLS"):
        monkeypatch.setattr(f"firstlight.engine.held.{limit}", 1)  # so that each layer is noted by itself
    engine, computed, inner = tiny_engine("llama", LAYERS), list[int](), Pass._compute
    engine.machine.linear.per_second = 1e6

    def faster(_work: Work, stop: Stop) -> None:
        if stop.layer == 1:
            engine.machine.linear.per_second = 1e12

    engine.on_stop = faster
    monkeypatch.setattr(Pass, "_compute", lambda p, layer, batch: computed.append(layer) or inner(p, layer, batch))
    engine.add(Request("0", list(range(1, 200)), SamplingParams(max_tokens=1, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert computed == [0, 2]


@pytest.mark.parametrize("cancel_at", range(1, 2 * LAYERS, 2))
def test_a_cancel_between_noted_layers(cancel_at: int) -> None:
    """The others' bits stay, and every block comes back."""
    want, _ = run("llama", False, False)
    got, _ = run("llama", True, False, cancel_at)
    assert all(torch.equal(torch.stack(got[r]), torch.stack(want[r])) for r in "02")
    assert len(got.get("1", [])) < len(want["1"])


def test_calls_go_on_till_the_bell_rings() -> None:
    """It rings by itself, or in a call; stretches that nobody waits for are made in one go."""
    bell, tape, made = Bell(), Tape(), list[int]()
    for i in range(6):
        tape.note(made.append, (i,))
        if i == 3:
            tape.note(bell.ring, ())
    ends = [1, 2, 3, 5, 6, 7]
    bell.after(60.0)
    assert len(tape.timed(0, ends, bell)) == 4 and made == [0, 1, 2, 3]
    bell.after(60.0)
    assert len(tape.timed(5, ends[4:], bell)) == 2 and made == [0, 1, 2, 3, 4, 5]
    for seconds in (0.0, -1.0):
        bell.after(seconds)
        assert len(tape.timed(0, ends, bell)) == 1


@pytest.mark.parametrize("slow", [False, True])
def test_patience(slow: bool, noted: list[int]) -> None:
    """A pass that nobody wants makes one stop for all that was noted, and gives the same bits."""
    want, stops = run("llama", True, slow)
    got, fewer = run("llama", True, slow, patience_s=60.0)
    assert all(torch.equal(torch.stack(got[r]), torch.stack(want[r])) for r in want)
    assert len(fewer) < len(stops) / 2


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_news_end_patience(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel that comes while a layer is computed is heard before the next one."""
    engine, begun = tiny_engine("llama", LAYERS), list[int]()
    engine.patience_s = 60.0
    inner = Held.__init__

    def cancelling(held: Held, batch: Any, layers: range, waits: bool, compute: Any, _own: Any) -> None:
        def with_news(number: int) -> Iterator[Stop]:
            held._tape.note(begun.append, (number,))
            first = next(stops := compute(number))
            if number == layer:
                held._tape.note(engine.cancel, ("0",))
            yield from itertools.chain([first], stops)

        inner(held, batch, layers, waits, with_news)

    monkeypatch.setattr(Held, "__init__", cancelling)
    engine.add(Request("0", list(range(1, 100)), SamplingParams(max_tokens=3, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert begun == list(range(layer + 1)) and engine.pool.used == 0


def test_an_alarm_ends_patience_after_a_wait() -> None:
    """A unit that goes on later heeds the alarm that was set with that, whatever the unit before it was left to do."""
    engine, heard, layers = tiny_engine("llama", LAYERS, schedule="flowprefill"), list[str](), list[int]()
    inner, engine.patience_s = engine.policy, 60.0
    engine.machine.linear.per_second = engine.machine.attention.per_second = 1e7  # so that there are stops

    class Interrupting:
        """Its unit waits once, and goes on with an alarm for this very moment."""

        def step(self, now: float, events: list[Event], view: View) -> Plan:
            heard.extend(type(event).__name__ for event in events)
            if isinstance(events[-1], told.Timer) and heard.count("Timer") == 1:
                return Plan(yield_=tuple(view.units), memo=dict(view.memo))
            if isinstance(events[-1], told.UnitYielded):
                engine.machine.bell.after(60.0)  # as a unit in between leaves it
                return Plan(resume=tuple(view.units), wake_at=now, memo=dict(view.memo))
            return inner.step(now, events, view)

    def at_a_stop(_work: Work, stop: Stop) -> None:
        layers.append(stop.layer)
        if len(layers) == 1:
            engine.nudge()

    engine.policy, engine.on_stop = Interrupting(), at_a_stop  # type: ignore[assignment]
    engine.add(Request("0", list(range(1, 100)), SamplingParams(max_tokens=1, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert heard == ["Arrival", "Admitted", "Timer", "UnitYielded", "Timer"]
    assert layers[:2] == [0, 0]
