"""Layers that are noted first and computed afterwards give the bits and the stops of those computed call by call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from firstlight.core.request import Request, SamplingParams
from firstlight.engine.held import Held
from firstlight.engine.work import Stop, Work
from firstlight.kernels.native import lib
from tests.tiny import VOCABULARY, tiny_engine

if lib is None:
    pytest.skip("no compiled kernels here", allow_module_level=True)

LAYERS = 4
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]


def run(family: str, holds: bool, slow: bool, cancel_at: int = -1) -> tuple[dict[str, list[Tensor]], list[int]]:
    """Logits of three requests, and the layers at whose ends passes stopped. `slow`: passes stop inside layers."""
    engine = tiny_engine(family, LAYERS, schedule="sarathi:token_budget=96")
    machine, seen, stops = engine.machine, dict[str, list[Tensor]](), list[int]()
    machine.holds, machine.steady.most = holds, 0
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

    def counted(held: Held, batch: object, layers: range, waits: bool, compute: object) -> None:
        inner(held, batch, layers, waits, compute)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("cancel_at", range(1, 2 * LAYERS, 2))
def test_a_cancel_between_noted_layers(cancel_at: int) -> None:
    """The others' bits stay, and every block comes back."""
    want, _ = run("llama", False, False)
    got, _ = run("llama", True, False, cancel_at)
    assert all(torch.equal(torch.stack(got[r]), torch.stack(want[r])) for r in "02")
    assert len(got.get("1", [])) < len(want["1"])
