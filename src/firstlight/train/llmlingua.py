"""Calibrates `llmlingua`: how long this machine takes for prompts, for generated tokens and for shortening.

Prompts of several lengths run through the engine as it was opened, and through the compressor at some rates. Curves of
a fixed form, no term of which may be negative, go through the times; `prompt/breakeven.py` says from them when
shortening pays. They hold for this model, machine and precision, and for the same layers and segment.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.core.request import SamplingParams
from firstlight.engine.build import machine_name
from firstlight.engine.scorer import ModelScorer
from firstlight.llm import LLM
from firstlight.prompt.breakeven import Curves
from firstlight.prompt.llmlingua import LLMLingua, LLMLinguaConfig
from firstlight.train.calibrating import Found, Notebook
from firstlight.train.texts import calibration_text, pieces

RATES = 0.25, 0.5, 0.75
GENERATED = 9
"""Tokens behind each prompt; the first comes with it."""
AGAIN = 2
"""Each time is the shortest of so many."""


@dataclass(frozen=True)
class Config:
    """Raises UserError on values that can't be."""

    layers: str = field(default=LLMLinguaConfig.layers, metadata={"doc": "as the method's"})
    segment: int = field(default=LLMLinguaConfig.segment, metadata={"doc": "as the method's"})
    length: int = field(
        default=4096, metadata={"doc": "tokens of the longest prompt; others have a half, down to a sixteenth"}
    )

    def __post_init__(self) -> None:
        LLMLinguaConfig(layers=self.layers, segment=self.segment)
        if self.length < 256:
            raise UserError(f"llmlingua: length={self.length} is out of range; give 256 tokens or more")


def calibrate(llm: LLM, config: Config, notebook: Notebook) -> Found:
    """Coefficients of `Curves`, and from which length on shortening pays for a first token; None = never."""
    longest = llm.engine.limits.max_model_len
    if config.length + GENERATED > longest:
        raise UserError(f"llmlingua: length={config.length} doesn't fit; this model has room for {longest - GENERATED}")
    lengths = [config.length // part for part in (16, 8, 4, 2, 1)]
    runs = [ids for length in lengths for ids in pieces(llm.encode(calibration_text()), AGAIN, length)]
    done = notebook.read().get("seconds", torch.zeros(0, 2 + len(RATES), dtype=torch.float64))
    _seconds(llm, config, [len(runs), *runs[0][1:]])  # what happens once
    for n in range(len(done), len(runs)):
        notebook.tell("timing prompts", n, len(runs))
        done = torch.cat([done, _seconds(llm, config, [n, *runs[n][1:]])[None]])
        notebook.write({"seconds": done})
    notebook.tell("timing prompts", len(runs), len(runs))
    curves = fit(lengths, done.view(len(lengths), AGAIN, -1).amin(1))
    first = {f"pays_from_{rate:g}": curves.pays_from(rate, 1, longest) for rate in RATES}
    return Found({"machine": machine_name(llm.options), **asdict(curves), **first}, {})


def fit(lengths: Sequence[int], seconds: Tensor) -> Curves:
    """From f64 [lengths, 2 + rates]: of the prompt, of a generated token, of shortening at each rate."""
    n = torch.tensor(lengths, dtype=torch.float64)[:, None]
    r = torch.tensor(RATES, dtype=torch.float64)
    one = torch.ones(len(n), len(r), dtype=torch.float64)
    parts = torch.stack([one, n * one, n * r, n**2 * r], -1).view(-1, 4)
    return Curves(
        prefill=positive(torch.cat([n**0, n, n**2], 1), seconds[:, 0]),
        step=positive(torch.cat([n**0, n], 1), seconds[:, 1]),
        shorten=positive(parts, seconds[:, 2:].reshape(-1)),
    )


def positive(parts: Tensor, seconds: Tensor) -> list[float]:
    """Factors of 0 or more [k] with which `parts` [n, k] come nearest to `seconds` [n], as shares of these.

    Some factors are 0 and the others the least squares of their own: with few parts all choices can be tried.
    """
    parts = parts / seconds[:, None]
    best, found = float("inf"), [0.0] * parts.shape[1]
    for size in range(1, parts.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(parts.shape[1]), size)):
            scale = parts[:, chosen].amax(0)
            factors = torch.linalg.lstsq(parts[:, chosen] / scale, torch.ones_like(seconds)).solution / scale
            off = float((parts[:, chosen] @ factors - 1).square().sum())
            if bool((factors >= 0).all()) and off < best - 1e-12:
                best, found = off, [0.0] * parts.shape[1]
                for place, factor in zip(chosen, factors.tolist()):
                    found[place] = factor
    return found


def _seconds(llm: LLM, config: Config, ids: Sequence[int]) -> Tensor:
    """f64 [2 + rates] of one prompt, which begins with a token of its own: the prefix cache knows nothing of it."""
    params = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    report = llm.generate([list(ids)], params)[0].report
    shortened = [_shortening(llm, config, ids, rate) for rate in RATES]
    return torch.tensor([report["timings"]["prefill_s"], report["tpot_s"], *shortened], dtype=torch.float64)


def _shortening(llm: LLM, config: Config, ids: Sequence[int], rate: float) -> float:
    editor = LLMLingua(LLMLinguaConfig(rate=rate, layers=config.layers, segment=config.segment))
    editor.bind(llm.config.facts(""), None)
    prompt = PromptIds(ids, [(0, len(ids))], "", llm.tokenizer.decode)
    began = time.perf_counter()
    editor.edit(prompt, ModelScorer(llm.engine.machine.model))
    return time.perf_counter() - began
