"""Whatever is raised inside a step, Ctrl-C too, ends what it hit and nothing else: the engine goes on, its log too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core.registry import Method, make_schedule
from firstlight.core.request import Request, SamplingParams, TokenOutput
from firstlight.core.schedule import Event, Plan, Segment, WorkUnit
from firstlight.core.view import View
from firstlight.engine import engine as engine_module
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.engine.replay import replay
from firstlight.engine.report import report
from firstlight.engine.work import Stop, Work
from firstlight.reuse.prefix import Hit
from tests.tiny import VOCABULARY, tiny_engine

COLUMN = 2 * 2 * 2 * 64 * 16 * 4
"""Bytes of a column of the tiny model in float32: layers, KV heads, K and V, tokens, head size, bytes."""


def request(rid: str, length: int, new: int = 4) -> Request:
    ids = [(7 * i + length) % VOCABULARY for i in range(length)]
    return Request(rid, ids, SamplingParams(max_tokens=new, ignore_eos=True))


def run(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for out in engine.step():
            outputs.setdefault(out.rid, []).append(out)
        engine.pool.check()
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [i for out in outputs for i in out.new_ids]


def is_empty(engine: Engine) -> bool:
    units = engine._queue or engine._yielded or engine._running
    return not units and not engine.pool.used and not engine.pool.reserved and not engine.machine.park.nbytes


def interrupting(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The same call, but an interrupt comes with the `at`-th time."""
    times = 0

    def counted(*args: Any) -> Any:
        nonlocal times
        times += 1
        if times == at:
            raise KeyboardInterrupt
        return call(*args)

    return counted


def in_a_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    engine.on_stop = interrupting(lambda *_: None, at)


def in_an_operator(engine: Engine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(engine.machine.model, "finish", interrupting(engine.machine.model.finish, at))


def in_sampling(engine: Engine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(engine_module, "sample", interrupting(engine_module.sample, at))


def in_the_policy(engine: Engine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(engine.policy, "step", interrupting(engine.policy.step, at))


def as_it_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(LiveRequest, "settle", interrupting(LiveRequest.settle, at))


PLACES = [in_a_pass, in_an_operator, in_sampling, in_the_policy, as_it_ends]


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_leaves_an_engine_that_works(
    place: Callable[..., None], at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    engine = tiny_engine(schedule="sarathi:token_budget=64", event_log=str(path))
    for i, length in enumerate((100, 30, 150)):
        engine.add(request(f"r{i}", length))
    place(engine, monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    outputs = run(engine)
    assert all(out[-1].finish_reason in ("length", "error") for out in outputs.values()) and is_empty(engine)
    engine.add(request("again", 100))
    assert tokens(run(engine)["again"]) == alone(100)
    engine.close()
    config_of = lambda config: make_schedule(Method("sarathi", token_budget="64"), config)  # noqa: E731
    assert replay(path, config_of).difference is None


def alone(length: int, **options: Any) -> list[int]:
    engine = tiny_engine(**options)
    engine.add(request("r", length))
    return tokens(run(engine)["r"])


def test_an_interrupt_hits_only_the_requests_of_its_unit() -> None:
    engine = tiny_engine(schedule="sarathi:token_budget=16")
    engine.add(request("long", 300))
    engine.step()
    while not engine._yielded:
        if engine.on_stop is None:
            engine.on_stop = lambda *_: engine.add(request("short", 8)) if not engine.is_live("short") else None
        engine.step()
    engine.on_stop = interrupting(lambda *_: None, 1)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    outputs = run(engine)
    ends = {rid: out[-1].finish_reason for rid, out in outputs.items()}
    assert sorted(ends.values()) == ["error", "length"] and is_empty(engine)


def test_closing_twice_is_closing(tmp_path: Path) -> None:
    engine = tiny_engine(event_log=str(tmp_path / "log"))
    engine.add(request("r", 70))
    engine.step()
    engine.close()
    engine.close()
    assert is_empty(engine) and engine.pool.free == engine.pool.total


def test_a_name_is_used_once_at_a_time() -> None:
    engine = tiny_engine()
    engine.add(request("r", 5))
    with pytest.raises(AssertionError, match="under way"):
        engine.add(request("r", 6))


class Scripted:
    """A policy that follows a script: one plan a step."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = list(plans)

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan:
        return self.plans.pop(0) if self.plans else Plan()


def interrupted_at(at: int, family: str, holds: bool) -> tuple[int, dict[int, Tensor], list[Tensor]]:
    """A prompt that gives way at its `at`-th stop (0: never): stops, logits by ordinal, K and V of each layer."""
    engine = tiny_engine(family, 3, prefix_cache="off")
    machine = engine.machine
    machine.holds, machine.linear.per_second, machine.attention.per_second = holds, 1e7, 1e7
    a, b = (WorkUnit(i, (Segment(rid, "prefill", (0, 150), (0, 3)),), "slice") for i, rid in enumerate("ab"))
    between = [Plan(yield_=(0,)), Plan(submit=(b,)), Plan(resume=(0,))] if at else []
    engine.policy = Scripted([Plan(admit=("a", "b")), Plan(submit=(a,)), *between])
    stops, logits, cells = 0, dict[int, Tensor](), list[Tensor]()

    def at_a_stop(work: Work, stop: Stop) -> None:
        nonlocal stops
        if work.unit.uid == 0:
            stops += 1
            if stops == at:
                engine.nudge()

    def first_token(_so_far: Sequence[int], row: Tensor) -> int:
        cells.extend(kv for layer in range(3) for kv in live.kv.entries(layer))
        logits[150] = row.clone()
        return 0

    engine.on_stop = at_a_stop
    asked = replace(
        request("a", 150, new=1),
        logits_at="all",
        logits_sink=lambda tok, rows: logits.update(zip(tok.tolist(), rows.clone())),
        choose=first_token,
    )
    live = engine.add(asked)
    engine.add(replace(request("b", 150, new=1), prompt_ids=[i * i % VOCABULARY for i in range(150)]))
    while engine.is_live("a"):
        engine.step()
    assert engine.is_live("b") == (not at), "who runs in between is done before"
    engine.close()
    return stops, logits, cells


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("holds", [False, True])
def test_another_may_run_at_every_stop_of_a_prefill(holds: bool, family: str) -> None:
    """Wherever it stands, between operators or inside one: not a bit of it changes."""
    num, logits, cells = interrupted_at(0, family, holds)
    assert num > 25 and len(logits) == 151 and len(cells) == 6
    for at in range(1, num + 1):
        stops, again, there = interrupted_at(at, family, holds)
        assert stops == num and again.keys() == logits.keys()
        assert all(torch.equal(again[tok], row) for tok, row in logits.items())
        assert all(torch.equal(one, other) for one, other in zip(there, cells, strict=True))


def yielded_pair() -> Engine:
    """An engine with one yielded unit over requests a and b."""
    engine = tiny_engine()
    segments = tuple(Segment(rid, "prefill", (0, 50), (0, 2)) for rid in "ab")
    unit = WorkUnit(0, segments, "slice")
    engine.policy = Scripted([Plan(admit=("a", "b")), Plan(submit=(unit,)), Plan(yield_=(0,))])
    engine.add(request("a", 50))
    engine.add(request("b", 50))
    engine.on_stop = lambda *_: engine.nudge() if not engine._yielded else None
    while not engine._yielded:
        engine.step()
    return engine


def test_all_of_a_yielded_unit_go_when_the_last_is_cancelled() -> None:
    engine = yielded_pair()
    engine.cancel("a")
    engine.step()
    assert engine.is_live("a"), "its rows are in a unit that b still wants"
    engine.cancel("b")
    engine.step()
    assert not engine.has_work and is_empty(engine)


def test_a_preemption_sets_the_cancelled_of_its_unit_free() -> None:
    engine = yielded_pair()
    engine.cancel("a")
    engine.policy = Scripted([Plan(preempt=(("b", "recompute"),)), Plan()])
    engine.step()
    assert not engine.is_live("a") and engine.is_live("b") and is_empty(engine)


def test_half_made_rows_are_not_parked() -> None:
    engine = yielded_pair()
    engine.cancel("a")
    engine.policy = Scripted([Plan(preempt=(("b", "park"),))])
    with pytest.raises(AssertionError, match="half through"):
        engine.step()


def test_a_hit_that_fills_the_pool_is_admitted() -> None:
    """The column to be copied is all that is left: to wait for another would be to wait for ever."""
    engine = tiny_engine(kv_memory=str(2 * COLUMN))
    for rid in ("first", "same"):
        live = engine.add(request(rid, 100))
        for _ in range(50):
            engine.step()
            engine.pool.check()
        assert live.finish_reason == "length"
    assert live.n_cached == 64 and "no room" in live.miss_reason


def test_times_add_up_after_a_preemption() -> None:
    engine = tiny_engine(kv_memory=str(4 * COLUMN))
    find = engine.admission._find

    def slow_again(live: LiveRequest) -> Hit:
        time.sleep(0.02 if live.num_preempted else 0)
        return find(live)

    engine.admission._find = slow_again  # type: ignore[method-assign]
    lives = [engine.add(request(f"r{i}", 60, new=90)) for i in range(3)]
    run(engine)
    assert sum(live.num_preempted for live in lives) > 0
    for live in lives:
        facts = report(live, engine.parts)
        assert sum(facts["timings"].values()) == pytest.approx(facts["ttft_s"], abs=1e-6)
        cells = facts["cells"]
        assert cells["computed"] + cells["reused"] == cells["total"] == 120
