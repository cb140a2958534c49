"""Decode passes that are replayed give the bits of those that aren't, whatever comes between two of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core.request import Request, SamplingParams
from firstlight.engine.engine import Engine
from firstlight.engine.steady import Steady, SteadyPass
from firstlight.engine.work import Stop, Work
from firstlight.evaluate import chaos
from firstlight.kernels.native import lib
from tests.path.law_runs import Asked, chaotic, differences, one_shot
from tests.tiny import VOCABULARY, tiny_engine, tiny_model

if lib is None:
    pytest.skip("no compiled kernels here", allow_module_level=True)

LAYERS = 3


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every replay the number of layers."""
    ran: list[int] = []
    run = SteadyPass.run

    def counted(work: SteadyPass) -> Iterator[Stop]:
        last = -1
        for stop in run(work):
            ran.append(stop.layer - last)
            last = stop.layer
            yield stop

    monkeypatch.setattr(SteadyPass, "run", counted)
    return ran


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are replayed with stops between them, as those that take long are."""
    replay = Steady.replay
    monkeypatch.setattr(Steady, "replay", lambda self, unit, lives, stride: replay(self, unit, lives, lambda *_: 1))


def logits_of(engine: Engine, seed: int = 0, most: int | None = None, cancels: str = "") -> dict[str, list[Tensor]]:
    """Five requests that come and go; threads change; `cancels` goes inside a pass. All logits, by request."""
    seen: dict[str, list[Tensor]] = {}
    rng, threads = random.Random(seed), torch.get_num_threads()
    if most is not None:
        engine.machine.steady.most = most

    def sample(lives: list[Any], work: Work, inner: Any = engine._sample) -> Any:
        for live in lives:
            seen.setdefault(live.rid, []).append(work.logits[live.rid].clone())
        return inner(lives, work)

    def at_a_stop(work: Work, stop: Stop) -> None:
        if cancels and len(seen.get(cancels, ())) == 20 and stop.layer == 1:
            engine.cancel(cancels)

    engine._sample, engine.on_stop = sample, at_a_stop  # type: ignore[method-assign]
    coming = [
        Request(
            str(i),
            [(7 * j + i) % VOCABULARY for j in range(20 + 31 * i)],
            SamplingParams(max_tokens=30 + 13 * i, ignore_eos=True),
        )
        for i in range(5)
    ]
    while coming or engine.has_work:
        if coming and (not engine.has_work or rng.random() < 0.1):
            engine.add(coming.pop())
        torch.set_num_threads(rng.choice([1, 2]))
        engine.step()
    torch.set_num_threads(threads)
    return seen


def same(got: dict[str, list[Tensor]], want: dict[str, list[Tensor]]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(torch.stack(got[r]), torch.stack(want[r])) for r in want)


@pytest.mark.parametrize(("family", "precision"), [("llama", "bf16"), ("llama", "int8"), ("qwen2", "f32")])
def test_a_replayed_step_has_the_bits_of_an_ordinary_one(family: str, precision: str, replays: list[int]) -> None:
    want = logits_of(tiny_engine(family, LAYERS, precision=precision), most=0)
    assert not replays
    got = logits_of(tiny_engine(family, LAYERS, precision=precision))
    assert same(got, want)
    assert sum(replays) > 100 and set(replays) == {LAYERS}


def test_planners_of_prompts_leave_decode_to_replays(replays: list[int]) -> None:
    """Those that plan generated tokens too are asked each time, unless their plans follow from places."""
    for method, some in (
        ("trishape:sink=4,window=16", True),
        ("band:sink=4,window=16", True),
        ("blasst:scale=20", False),
    ):
        want = logits_of(tiny_engine(num_layers=LAYERS, method=[method]), most=0)
        replays.clear()
        assert same(logits_of(tiny_engine(num_layers=LAYERS, method=[method])), want)
        assert (sum(replays) > 100) is some


@pytest.mark.parametrize(
    ("family", "method", "some"),
    [
        ("gemma3", [], True),
        ("llama", ["fastkv:tsp_idx=1,tsp_rate=0.4,retain_rate=0.3"], True),
        ("gemma3", ["fastkv:tsp_rate=0.4,retain_rate=0.3"], True),
        ("llama", ["lazyllm:boundaries=0;1,keep=0.6,revive=off"], True),
        ("llama", ["lazyllm:boundaries=0;1,keep=0.6"], False),
    ],
)
def test_rows_in_tables_of_every_kind(family: str, method: list[str], some: bool, replays: list[int]) -> None:
    """Windows move on, heads end anywhere in their blocks, rows are gone; who has a say in decode steps is asked."""
    want = logits_of(tiny_engine(family, LAYERS, method=method), most=0)
    replays.clear()
    assert same(logits_of(tiny_engine(family, LAYERS, method=method)), want)
    assert (sum(replays) > 100) is some


@pytest.mark.usefixtures("one_by_one")
def test_a_cancel_inside_a_replayed_pass(replays: list[int]) -> None:
    want = logits_of(tiny_engine(num_layers=LAYERS), most=0, cancels="3")
    got = logits_of(tiny_engine(num_layers=LAYERS), cancels="3")
    assert same(got, want)
    assert len(got["3"]) == 20 and sum(replays) > 100


def test_several_passes_at_once(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    """Passes that wait between layers, others in between, preemption."""
    monkeypatch.setattr(chaos, "_STOPS", ("layer",))
    model = tiny_model(torch.bfloat16, LAYERS)
    asked = [Asked(str(i), tuple((5 * j + i) % VOCABULARY for j in range(30 + 20 * i)), 40) for i in range(4)]
    want = one_shot(model, asked)
    yielded = 0
    for seed in range(3):
        got, policy = chaotic(model, asked, seed)
        assert differences(got, want) == []
        yielded += policy.num_yielded
    assert yielded > 10 and sum(replays) > 100


def test_a_foreign_operator_is_not_replayed(monkeypatch: pytest.MonkeyPatch, replays: list[int]) -> None:
    """A model whose layers make a tensor of their own on the way."""

    def engine() -> Engine:
        made = tiny_engine(num_layers=LAYERS)
        finish = made.machine.model.finish
        monkeypatch.setattr(made.machine.model, "can_hold", False)
        monkeypatch.setattr(made.machine.model, "finish", lambda layer, x, a: finish(layer, x, a * 0.5 if layer else a))
        return made

    want = logits_of(engine(), most=0)
    assert same(logits_of(engine()), want)
    assert not replays
