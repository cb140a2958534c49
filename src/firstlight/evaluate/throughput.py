"""What a batch gains: the same requests with more and more of them under way at once.

Every row runs the same mix of prompts, each of which begins differently, and the prefix cache is off: nothing is
computed once for two requests. The clock runs over the engine's steps, from the first request to the last token.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import firstlight
from firstlight.core.config import int8_parts
from firstlight.core.errors import UserError
from firstlight.core.request import Request, SamplingParams
from firstlight.evaluate.machine import peak_rss_mb
from firstlight.evaluate.speed import as_context, shipped_text, spread
from firstlight.llm import LLM

_STRIDE = 97
"""Each prompt begins so many tokens later in the text than the one before."""


@dataclass(slots=True)
class Run:
    """Seconds and tokens of one run, told apart by whether any request under way still waited for its first token."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    """Generated in steps in which nobody waited; tokens of requests that decode beside a prefill are not here."""
    new_tokens: int = 0
    unread: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)

    @property
    def wall_s(self) -> float:
        return self.prefill_s + self.decode_s


def measure(
    llm: LLM,
    batches: Sequence[int],
    lengths: Sequence[int],
    *,
    num_new: int,
    repeat: int,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """A row for one request at a time, then for each of the batch sizes: `repeat` runs after a warm-up.

    A run holds as many requests as are under way at once, rounded up so that each prompt length has equally many.
    `gain` is new tokens a second over those of one request at a time. Raises UserError on sizes that can't be.
    """
    check(batches, lengths, num_new, repeat)
    alone: float | None = None
    for batch in dict.fromkeys([1, *batches]):
        asked = prompts(llm.encode, lengths, math.ceil(batch / len(lengths)) * len(lengths))
        tell(f"{batch} at once, warm-up")
        _run(llm, asked, batch, min(num_new, 2))
        runs = []
        for n in range(repeat):
            tell(f"{batch} at once, {n + 1} of {repeat}")
            runs.append(_run(llm, asked, batch, num_new))
        row = _row(llm, batch, asked, runs)
        alone = alone or row["new_tok_s"]
        yield {**row, "gain": row["new_tok_s"] / alone}


def check(batches: Sequence[int], lengths: Sequence[int], num_new: int, repeat: int) -> None:
    """UserError unless there is something to measure."""
    if not batches or min(batches) < 1:
        raise UserError(f"batch sizes {list(batches)} are out of range; give 1 or more requests")
    if not lengths or min(lengths) < 1:
        raise UserError(f"prompt lengths {list(lengths)} are out of range; give 1 or more tokens")
    if num_new < 2 or repeat < 1:
        raise UserError("throughput needs two new tokens and one repeat; give 2 or more, and 1 or more")


def prompts(encode: Callable[[str], list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Ids of the shipped text, the lengths in turn, every prompt beginning at another place."""
    ids = encode(shipped_text())
    ids *= (max(lengths) + _STRIDE * count) // len(ids) + 1
    return [ids[_STRIDE * n : _STRIDE * n + lengths[n % len(lengths)]] for n in range(count)]


def _run(llm: LLM, asked: Sequence[list[int]], at_once: int, num_new: int) -> Run:
    params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    waiting = deque((f"throughput-{n}", ids) for n, ids in enumerate(asked))
    run = Run()
    while waiting or run.running:
        began = time.perf_counter()
        while waiting and len(run.running) < at_once:
            rid, ids = waiting.popleft()
            llm.engine.add(Request(rid, llm.answers.editing.edit(as_context(llm, ids)).ids, params))
            run.running.add(rid)
            run.unread.add(rid)
            run.prefill_tokens += len(ids)
        _step(llm, run, began)
    return run


def _step(llm: LLM, run: Run, began: float) -> None:
    is_prefill, new = bool(run.unread), 0
    for output in llm.engine.step():
        new += len(output.new_ids)
        run.unread.discard(output.rid)
        if output.finish_reason is not None:
            run.running.discard(output.rid)
    seconds = time.perf_counter() - began
    run.new_tokens += new
    if is_prefill:
        run.prefill_s += seconds
    else:
        run.decode_s += seconds
        run.decode_tokens += new


def _row(llm: LLM, batch: int, asked: Sequence[list[int]], runs: Sequence[Run]) -> dict[str, Any]:
    def median(rate: Callable[[Run], float]) -> float:
        return statistics.median(rate(run) for run in runs)

    return {
        "engine": "firstlight",
        "version": firstlight.__version__,
        "settings": asdict(llm.options),
        "exact": not int8_parts(llm.options.precision) and all(part.capability.exact for part in llm.engine.parts),
        "batch": batch,
        "requests": len(asked),
        "prompt_tokens": [len(ids) for ids in asked],
        "new_tokens": runs[0].new_tokens // len(asked),
        "wall_s": spread([run.wall_s for run in runs]),
        "prefill_tok_s": median(lambda run: run.prefill_tokens / run.prefill_s),
        "decode_tok_s": median(lambda run: run.decode_tokens / run.decode_s),
        "new_tok_s": median(lambda run: run.new_tokens / run.wall_s),
        "total_tok_s": median(lambda run: (run.prefill_tokens + run.new_tokens) / run.wall_s),
        "rss_mb": peak_rss_mb(),
    }
