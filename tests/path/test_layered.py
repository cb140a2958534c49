"""`layered` from prompt to token: prompts that wait between two groups of layers answer as they do alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core.schedule import Preempted
from firstlight.engine.engine import Engine
from tests.path.method_runs import begin, finish, method_engine, prompt, run, same_bits
from tests.tiny import tiny_engine

LAYERS = 6
COLUMN = LAYERS * 2 * 2 * 64 * 16 * 4
"""Bytes of a column of the tiny model in float32: layers, KV heads, K and V, tokens, head size, bytes."""
SCHEDULE = "layered:stage_tokens=16"
"""A prompt of more than 80 tokens goes one layer a unit."""


def layered(**options: Any) -> Engine:
    return method_engine(layers=LAYERS, schedule=SCHEDULE, **options)


def alone(seed: int, length: int, new: int) -> Any:
    return run(method_engine(layers=LAYERS), prompt(seed, length), new)


@pytest.mark.parametrize("left", [1, 3, 5])
def test_a_stream_that_ends_between_two_groups(left: int) -> None:
    """The prompt goes on by itself from the layer where it waits."""
    engine = layered()
    stream = begin(engine, prompt(0, 40), 1 + left, "stream")
    while not stream.kept:
        engine.step()
    long = begin(engine, prompt(1, 200), 4, "long")
    assert stream.live is not None and long.live is not None
    while engine.is_live("stream"):
        engine.step()
    assert long.live.f == [200] * left + [0] * (LAYERS - left)
    assert engine.machine.park.count("long", "waiting") == 200
    finish(engine, stream, long)
    assert same_bits(stream, alone(0, 40, 1 + left)) and same_bits(long, alone(1, 200, 4))


def test_one_that_is_preempted_between_two_groups() -> None:
    """Streams grow into the blocks that it holds: its rows are dropped, and later all of it is computed again."""
    engine = layered(kv_memory=str(4 * COLUMN))
    at: list[tuple[int, int, int]] = []
    decide = engine._decide

    def watched(events: list[Any]) -> None:
        for event in (e for e in events if isinstance(e, Preempted)):
            f = engine.view.requests[event.rid].f
            at.append((f[0], f[-1], event.parked_bytes))
        decide(events)

    engine._decide = watched  # type: ignore[method-assign]
    streams = [begin(engine, prompt(i, 60), 12, f"s{i}") for i in range(2)]
    while len(streams[1].kept) < 2:
        engine.step()
    long = begin(engine, prompt(2, 100), 4, "long")
    finish(engine, *streams, long)
    assert at == [(100, 0, 0)], "its first layers were done, its last were not, and no row waits any more"
    assert all(same_bits(stream, alone(i, 60, 12)) for i, stream in enumerate(streams))
    assert same_bits(long, alone(2, 100, 4))


class Counted:
    """A model's linears, which say who calls them while some layer of the prompt `rid` is computed."""

    def __init__(self, engine: Engine, rid: str) -> None:
        self.engine, self.rid, self.inner = engine, rid, engine.machine.model.linears
        self.calls, self.units = Counter[str](), set[int]()
        engine.machine.model.linears = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, name: str, x: Tensor, add: Tensor | None = None) -> Tensor:
        running = self.engine._running
        for segment in running.unit.segments if running else ():
            first, end = segment.layer
            if segment.rid == self.rid and segment.kind == "prefill" and first <= int(name.split(".")[0]) < end:
                self.calls[name] += 1
                self.units.add(running.unit.uid)  # type: ignore[union-attr]
        return self.inner(name, x, add)


@pytest.mark.parametrize("schedule", [SCHEDULE, "sarathi:token_budget=17"])
def test_an_experts_weights_are_read_once_a_group(schedule: str) -> None:
    """In chunks each of them is read once a chunk: what the schedule is for."""
    engine = tiny_engine("qwen3_moe", 4, schedule=schedule, deterministic=True, prefix_cache="off")
    stream = begin(engine, prompt(0, 10), 60, "stream")
    while not stream.kept:
        engine.step()
    counted = Counted(engine, "long")
    long = begin(engine, prompt(1, 300), 1, "long")
    finish(engine, stream, long)
    products = {f"{layer}.{expert}.{name}" for layer in range(4) for expert in range(5) for name in ("gate_up", "down")}
    times = [counted.calls[name] for name in sorted(products)]
    if schedule == SCHEDULE:
        assert len(counted.units) == 4 and set(times) == {1}
    else:
        assert len(counted.units) == 19 == max(times) and min(times) > 9
    want = run(tiny_engine("qwen3_moe", 4, deterministic=True, prefix_cache="off"), prompt(1, 300), 1)
    assert all(torch.equal(long.logits[t], row) for t, row in want.logits.items())
