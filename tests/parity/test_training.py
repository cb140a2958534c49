"""The differentiable forward pass beside the engine, and the training of gates: exact where it must be, resumable."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.request import Request, SamplingParams
from firstlight.prompt.tokenizer import Tokenizer
from firstlight.train import duoattention, trunk
from firstlight.train.calibrating import Notebook
from firstlight.train.duoattention import Config, Gates, streaming
from firstlight.train.passkeys import WORDS, Passkeys, Sample
from firstlight.train.texts import calibration_text
from firstlight.train.trunk import Trunk
from tests.tiny import bytes_tokenizer, tiny_config, tiny_engine, tiny_weights

SMALL = Config(steps=12, min_len=60, max_len=90, passkeys=1, words=1, sink=8, recent=16)


def tiny_trunk(family: str = "llama", dtype: torch.dtype = torch.float32) -> Trunk:
    return Trunk(tiny_config(2, family), tiny_weights(dtype, 2, family))


def sample(seed: int = 0, length: int = 80) -> Sample:
    ids = torch.randint(320, (length,), generator=torch.Generator().manual_seed(seed))
    return Sample(ids, torch.arange(length - 20, length - 1))


@pytest.mark.parametrize("family", trunk.FAMILIES)
def test_the_trunk_gives_the_engines_logits(family: str) -> None:
    ids, seen = sample(1, 300).ids, torch.full((300, 320), torch.nan)
    engine = tiny_engine(family)
    sampling = SamplingParams(max_tokens=1)
    engine.add(Request("r", ids.tolist(), sampling, logits_at="all", logits_sink=seen.__setitem__))
    while engine.has_work:
        engine.step()
    made = tiny_trunk(family)
    logits = made.hidden(ids, made.dense) @ tiny_weights(num_layers=2, family=family)["model.embed_tokens.weight"].T
    assert (logits - seen).abs().max() < 1e-3


def test_layers_computed_again_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> Tensor:
        gates = Gates(tiny_trunk(), SMALL)
        with torch.no_grad():
            gates.alpha.fill_(0.5)
        gates.distance(sample()).backward()
        assert gates.alpha.grad is not None
        return gates.alpha.grad

    kept = gradient()
    monkeypatch.setattr(trunk, "_KEPT_NBYTES", 0)
    assert torch.equal(gradient(), kept) and kept.abs().min() > 0


def test_the_gradient_is_that_of_finite_differences() -> None:
    gates = Gates(tiny_trunk(), SMALL)
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([[0.3, 0.6], [0.8, 0.5]]))
    gates.distance(sample()).backward()
    for place in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        ends = []
        for by in (-1e-2, 1e-2):
            moved = Gates(tiny_trunk(), SMALL)
            with torch.no_grad():
                moved.alpha.copy_(gates.alpha)
                moved.alpha[place] += by
                ends.append(float(moved.distance(sample())))
        assert gates.alpha.grad is not None
        assert (ends[1] - ends[0]) / 2e-2 == pytest.approx(float(gates.alpha.grad[place]), rel=0.02)


@pytest.mark.parametrize("rows", [25, 80, 300])
def test_streaming_reads_sink_and_window(rows: int) -> None:
    q, k, v = (torch.randn(1, heads, rows, 16) for heads in (6, 2, 2))
    row, key = torch.arange(rows)[:, None], torch.arange(rows)
    see = (key <= row) & ((key < 8) | (row - key < 16))
    scores = q @ k.repeat_interleave(3, 1).transpose(2, 3) / 4
    want = torch.where(see, scores, -torch.inf).softmax(-1) @ v.repeat_interleave(3, 1)
    got = streaming(q, k, v, 8, 16, 0.25)
    assert torch.allclose(got, want[:, :, 24:], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_gates_are_the_model_itself(dtype: torch.dtype) -> None:
    gates = Gates(tiny_trunk(dtype=dtype), SMALL)
    far = gates.distance(sample())
    far.backward()
    assert float(far.detach()) == 0 and gates.alpha.grad is not None and torch.isfinite(gates.alpha.grad).all()
    assert Gates(tiny_trunk(), SMALL).distance(sample(0, 24)).detach() == 0, "a sample that streaming reads whole"


def test_the_penalty_alone_closes_every_gate_and_gates_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = Gates(tiny_trunk(), dataclasses.replace(SMALL, steps=200, lr=0.1))
    monkeypatch.setattr(gates, "distance", lambda _: (gates.alpha * 0).sum())
    values = []
    for _ in range(60):
        gates.step(sample())
        values.append(gates.alpha.detach().clone())
    assert all((later <= before).all() for before, later in pairwise(values))
    assert (values[-1] == 0).all()
    monkeypatch.setattr(gates, "distance", lambda _: -gates.alpha.sum())
    for _ in range(60):
        gates.step(sample())
        assert (gates.alpha >= 0).all() and (gates.alpha <= 1).all()
    assert (gates.alpha == 1).all()


def test_rates_climb_stay_and_fall() -> None:
    config = Config(steps=100, lr=1.0)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == rates[-1] == pytest.approx(0.1) and rates[10] == pytest.approx(0.55)
    assert rates[20:80] == [1.0] * 60 and rates == pytest.approx(rates[::-1])


class Stopped(Exception):
    pass


def tokenizer(tmp_path: Path) -> Tokenizer:
    bytes_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_source(tmp_path)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, min_len=200, max_len=260)
    passkeys = Passkeys(tokenizer(tmp_path), calibration_text(), count=1, words=1, seed=0)
    monkeypatch.setattr(duoattention, "_SAVED_EVERY_S", -1.0)

    def train(path: Path, stop_at: int) -> Gates:
        told: list[Any] = []

        def tell(what: str, done: float, total: float) -> None:
            told.append((what, done, total))
            if done == stop_at:
                raise Stopped

        gates, notebook = Gates(tiny_trunk(), config), Notebook(path, {}, tell)
        if done := notebook.read():
            gates.load(done)
        duoattention._train(gates, passkeys, notebook)
        assert told[-1][1:] == (12, 12)
        return gates

    whole = train(tmp_path / "whole", -1)
    for stop_at in (1, 5, 9):
        with pytest.raises(Stopped):
            train(tmp_path / "parts", stop_at)
    again = train(tmp_path / "parts", -1)
    assert again.losses == whole.losses and len(whole.losses) == 12 and min(whole.losses[1:]) > 0
    assert torch.equal(again.alpha, whole.alpha) and whole.alpha.min() < 0.99


def test_minutes_end_a_training_with_what_it_has(tmp_path: Path) -> None:
    gates = Gates(tiny_trunk(), dataclasses.replace(SMALL, min_len=200, max_len=260, minutes=1e-9))
    passkeys = Passkeys(tokenizer(tmp_path), calibration_text(), count=1, words=1, seed=0)
    notebook = Notebook(tmp_path / "notes", {})
    duoattention._train(gates, passkeys, notebook)
    assert gates.losses == [] and notebook.read()["alpha"].tolist() == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("length", [900, 1300])
def test_samples_ask_for_every_passkey(tmp_path: Path, length: int) -> None:
    cutter = tokenizer(tmp_path)
    made = Passkeys(cutter, calibration_text(), count=3, words=4, seed=7)
    drawn = made.draw(5, length)
    assert torch.equal(drawn.ids, Passkeys(cutter, calibration_text(), count=3, words=4, seed=7).draw(5, length).ids)
    assert len(drawn.ids) == length and not torch.equal(drawn.ids, made.draw(6, length).ids)
    text = cutter.decode(drawn.ids.tolist())
    haystack, _, end = text.partition("These are the passkeys")
    asked = [line.split(" is: ")[1] for line in end.splitlines()[1:]]
    answers = cutter.decode(drawn.ids[drawn.answer_rows + 1].tolist())
    assert answers == "".join(f" {passkey}" for passkey in asked)
    for passkey in asked:
        words = passkey.split()
        assert len(words) == 4 and set(words) <= set(WORDS) and f" is: {passkey}.\n" in haystack
    depths = [haystack.index(passkey) / len(haystack) for passkey in asked]
    assert depths == sorted(depths)


def test_bad_settings_and_models_are_refused(tmp_path: Path) -> None:
    for key, value in (("steps", 0), ("passkeys", 11), ("max_len", 5), ("recent", 0)):
        with pytest.raises(UserError, match=f"{key}={value}"):
            Config(**{key: value})
    passkeys = Passkeys(tokenizer(tmp_path), calibration_text(), count=10, words=8, seed=0)
    with pytest.raises(UserError, match="a sample of 300 tokens"):
        passkeys.draw(0, 300)
    with pytest.raises(UserError, match="gemma3"):
        tiny_trunk("gemma3")
