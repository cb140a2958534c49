"""A trial of methods: on a small model with random weights, any prompts, under any schedule that the law allows.

What `evaluate/contract.py` checks runs here: in float32 and deterministic mode, where equal means equal bits.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlight.core import calibration
from firstlight.core.calibration import Calibration
from firstlight.core.config import Options
from firstlight.core.parts import Capability, ModelFacts, PromptIds
from firstlight.core.registry import Method, classes
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.build import build_engine
from firstlight.engine.editing import Editing
from firstlight.engine.engine import Engine
from firstlight.evaluate.chaos import Chaos
from firstlight.models.config import ModelConfig
from firstlight.models.weights.checkpoint import tensor_shapes

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY = 5, 6, 2, 16, 320
MODEL = ModelConfig("llama", LAYERS, 96, 192, HEADS, KV_HEADS, DIM, VOCABULARY, 1e-5, 10000.0, 4096, tie_head=True)
FACTS = ModelFacts("contract", LAYERS, HEADS, KV_HEADS, DIM, (None,) * LAYERS)
NEW = 4
"""Tokens to generate, so that what was left of the K/V is read."""
SARATHI = Method("sarathi", token_budget=64)
UNCUT = Method("sarathi", token_budget=1024)
"""The same where all prompts of a check fit into one unit."""


class Broken(Exception):
    """A check that doesn't hold: what, in one line."""


@dataclass(frozen=True)
class Subject:
    """What is checked: methods that work together, under a schedule."""

    methods: tuple[Method, ...]
    schedule: Method = SARATHI

    def settings(self, which: str) -> Subject | None:
        """With each method's `trial` or `identity` settings; None if one has none of that name."""
        made = []
        for method in self.methods:
            given = [found for cls in classes(method.name).values() if (found := getattr(cls, which, None)) is not None]
            if not given:
                return None
            joined = {key: value for settings in given for key, value in settings.items()}
            made.append(Method(method.name, **{**joined, **method.settings}))
        return replace(self, methods=tuple(made))

    def capabilities(self) -> list[Capability]:
        """Of its parts, as its settings make them."""
        return [part.capability for part in self.engine().parts]

    def engine(self, prefix_cache: str = "off", event_log: str | None = None) -> Engine:
        """A fresh engine over the model."""
        with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
            options = Options(
                method=[_calibrated(method, Path(folder)) for method in self.methods],
                schedule=self.schedule,
                precision="f32",
                prefix_cache=prefix_cache,
                deterministic=True,
                event_log=event_log,
                max_num_seqs=8,
            )
            return build_engine(MODEL, _weights(), options, FACTS.digest)

    def acting(self) -> Subject:
        """With `trial` settings, where a method has them."""
        alone = [Subject((method,)) for method in self.methods]
        methods = tuple(m for one in alone for m in (one.settings("trial") or one).methods)
        return replace(self, methods=methods)


Rows = dict[str, list[Tensor]]
"""Request -> the logits of each of its generated tokens."""
Prompts = Mapping[str, Sequence[int]]


@cache
def _weights() -> dict[str, Tensor]:
    """The same random weights every time."""
    generator = torch.Generator().manual_seed(5)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, generator=generator) * 0.12
        return 1 + made if "norm" in name else made

    return {name: weight(name, shape) for name, shape in tensor_shapes(MODEL).items()}


def _calibrated(method: Method, folder: Path) -> Method:
    """The method with a calibration file of its own sample, if it has one."""
    sample = next((s for cls in classes(method.name).values() if (s := getattr(cls, "sample", None))), None)
    if sample is None or calibration.KEY in method.settings:
        return method
    path = folder / method.name
    calibration.write(path, Calibration(method.name, FACTS.digest, {}, {}, sample(FACTS)))
    return Method(method.name, **{**method.settings, calibration.KEY: str(path)})


def some_prompts(seed: int, lengths: Sequence[int]) -> dict[str, list[int]]:
    """Random prompts of these lengths, by request id."""
    rng = random.Random(seed)
    return {f"r{i}": [rng.randrange(VOCABULARY) for _ in range(length)] for i, length in enumerate(lengths)}


def asking(rid: str, ids: Sequence[int], rows: list[Tensor]) -> Request:
    """A greedy request that leaves the logits [V] of each of its tokens in `rows`."""

    def greedy(_so_far: Sequence[int], logits: Tensor) -> int:
        rows.append(logits.clone())
        return int(logits.argmax())

    return Request(rid, list(ids), SamplingParams(max_tokens=NEW, ignore_eos=True), choose=greedy)


def submit(engine: Engine, prompts: Prompts) -> tuple[list[Any], Rows]:
    """All prompts into the engine: the requests under way, and the logits that they will leave."""
    rows: Rows = {rid: [] for rid in prompts}
    return [engine.add(asking(rid, _edited(engine, ids), rows[rid])) for rid, ids in prompts.items()], rows


def _edited(engine: Engine, ids: Sequence[int]) -> list[int]:
    """A prompt as it is admitted: all of it is context."""
    edited = Editing(engine.parts, engine.machine.model).edit(
        PromptIds(ids, [(0, len(ids))], "8 9 10", lambda some: " ".join(map(str, some)))
    )
    if why := edited.notes.get("why"):
        raise Broken(f"a prompt of {len(ids)} tokens was not edited: {why}")
    return edited.ids


def drain(engine: Engine) -> None:
    """Steps until nothing is left to do; every block is accounted for after each."""
    while engine.has_work:
        engine.step()
        engine.pool.check()


def answers(
    engine: Engine,
    prompts: Prompts,
    chaos: int | None = None,
    at_stop: Callable[[Any, Any], None] = lambda _work, _stop: None,
) -> Rows:
    """All answers; under `chaos` any legal schedule that the seed says."""
    if chaos is not None:
        rng, engine.policy = random.Random(chaos), Chaos(chaos, LAYERS)

        def disturb(work: Any, stop: Any) -> None:
            at_stop(work, stop)
            if rng.random() < 0.05:
                engine.nudge()

        engine.on_stop = disturb
    lives, rows = submit(engine, prompts)
    drain(engine)
    for live in lives:
        if live.fallback:
            raise Broken(f"a request of {live.num_prompt} tokens fell back to dense: {live.fallback}")
    return rows
