"""How fast our own engine is: repeated requests on prompts of real text, with the first call told apart.

A prompt of N tokens is the shipped text, repeated and cut as ids. The prefix cache is off, or the second repeat would
find the first one's cells.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import firstlight
from firstlight.core.errors import UserError
from firstlight.core.files import shipped
from firstlight.core.parts import PromptIds
from firstlight.core.request import SamplingParams
from firstlight.evaluate.machine import peak_rss_mb
from firstlight.evaluate.peak import limit_s
from firstlight.llm import LLM

TEXT = "moby-dick-chapter-87.txt"


def shipped_text() -> str:
    """What prompts are made of."""
    return shipped(f"evaluate/texts/{TEXT}")


def prompt_of(llm: LLM, num_tokens: int) -> list[int]:
    """Exactly `num_tokens` ids of real text."""
    ids = llm.encode(shipped_text())
    return (ids * (num_tokens // len(ids) + 1))[:num_tokens]


def as_context(llm: LLM, ids: list[int]) -> PromptIds:
    """Ids that a method may shorten, all of them."""
    return PromptIds(ids, [(0, len(ids))], "", llm.tokenizer.decode)


def measure(
    llm: LLM,
    lengths: Sequence[int],
    *,
    num_decode: int,
    repeat: int,
    peak_gflops: float,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """A row for each prompt length: `repeat` requests after a warm-up, each generating `num_decode` tokens.

    Speeds are medians; seconds in `ttft_s` and `tpot_s` are {median, min, max, samples}.
    """
    check(lengths, repeat, num_decode)
    for length in lengths:
        prompt = as_context(llm, prompt_of(llm, length))
        reports = []
        for n in range(repeat + 1):
            tell(f"{length} tokens, {'warm-up' if n == 0 else f'{n} of {repeat}'}")
            reports.append(_one(llm, prompt, num_decode))
        yield _row(llm, length, reports, peak_gflops)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the samples themselves."""
    values = list(samples)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "samples": values}


def _one(llm: LLM, prompt: PromptIds, num_decode: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=num_decode, temperature=0.0, ignore_eos=True)
    return llm.generate([prompt], params)[0].report


def _row(llm: LLM, length: int, reports: Sequence[dict[str, Any]], peak_gflops: float) -> dict[str, Any]:
    warm_up, *steady = reports
    ttft = spread([r["ttft_s"] for r in steady])
    prefill_s = statistics.median(r["timings"]["prefill_s"] for r in steady)
    tpot = spread([r["tpot_s"] for r in steady]) if steady[0]["tpot_s"] else None
    admitted = steady[0]["prompt_tokens"]  # fewer than `length` where a method shortens prompts
    return {
        "engine": "firstlight",
        "version": firstlight.__version__,
        "settings": steady[0]["settings"],
        "exact": steady[0]["exact"],
        "prompt_tokens": length,
        "first_call_ttft_s": warm_up["ttft_s"],
        "ttft_s": ttft,
        "prefill_tok_s": admitted / prefill_s,
        "decode_tok_s": 1 / tpot["median"] if tpot else None,
        "tpot_s": tpot,
        "density": steady[0]["attention"]["density"],
        "rss_mb": peak_rss_mb(),
        "limit_s": limit_s(llm.config, admitted, peak_gflops),
        "mfu": limit_s(llm.config, admitted, peak_gflops) / prefill_s,
    }


def check(lengths: Sequence[int], repeat: int, num_decode: int) -> None:
    """UserError unless there is something to measure."""
    if not lengths or min(lengths) < 1:
        raise UserError(f"prompt lengths {list(lengths)} are out of range; give 1 or more tokens")
    if repeat < 1 or num_decode < 1:
        raise UserError("a measurement needs at least one repeat and one token; give 1 or more")
