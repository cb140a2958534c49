"""What a long prompt does to others, under one schedule: the time between their tokens, and the wait of an urgent one.

Two scenes. In the first some streams are running when a long prompt comes: only gaps between tokens that overlap its
prefill count. In the second urgent short prompts come at random moments of a running prefill: what counts is their time
to first token less what it takes them alone. A request comes at a moment that was fixed beforehand, not when the engine
next looks, and its time runs from that moment.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import firstlight
from firstlight.core.config import int8_parts
from firstlight.core.errors import UserError
from firstlight.core.request import Request, SamplingParams
from firstlight.evaluate.machine import peak_rss_mb
from firstlight.evaluate.speed import prompt_of, spread
from firstlight.llm import LLM

_WARM = 4
"""Tokens that each stream has before anything is measured."""
_CALM = 16
"""Gaps of each stream that are measured before the prompt comes."""
_PHASE_S = 0.05
"""The long prompt comes at a random moment of so long a time."""
_PER_PREFILL = 5
"""Urgent requests in one prefill: one at a random moment of each fifth of it."""
_ALONE = 5
_SLO_S = 0.1
"""An urgent request wants its token within three times its own time, or this."""


@dataclass(frozen=True)
class Scene:
    """What comes together. Raises UserError on sizes that can't be."""

    streams: int = 4
    stream_tokens: int = 256
    prompt_tokens: int = 8000
    repeat: int = 3
    urgent: int = 0
    """Random arrivals of an urgent request; 0 leaves the second scene out."""
    urgent_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("streams", "stream_tokens", "prompt_tokens", "repeat", "urgent_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} is out of range; give 1 or more")
        if self.urgent < 0:
            raise UserError(f"urgent={self.urgent} is out of range; give 0 or more arrivals")


def measure(llm: LLM, scene: Scene, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The row of one schedule: that of `llm`, whose prefix cache is off.

    `itl_s` and `itl_alone_s` are {p50, p99, max, count}; `urgent.over_s` is {p50, p95, max, samples}: seconds beyond
    a request's own time, of which `urgent.own_s` is the median.
    """
    longest = max(scene.stream_tokens, scene.prompt_tokens, scene.urgent_tokens)
    stage, dice = Stage(llm, prompt_of(llm, longest)), random.Random(scene.seed)
    tell("warm-up")
    _beside_streams(stage, scene, dice)
    tell("the prompt alone")
    alone = stage.first_token("alone", scene.prompt_tokens)
    gaps: list[float] = []
    calm: list[float] = []
    waits = []
    for n in range(scene.repeat):
        tell(f"streams, {n + 1} of {scene.repeat}")
        wait, before, during = _beside_streams(stage, scene, dice)
        waits.append(wait)
        calm += before
        gaps += during
    urgent = _urgent(stage, scene, alone, dice, tell) if scene.urgent else None
    return {
        "engine": "firstlight",
        "version": firstlight.__version__,
        "settings": asdict(llm.options),
        "exact": not int8_parts(llm.options.precision) and all(part.capability.exact for part in llm.engine.parts),
        "schedule": llm.options.schedule,
        **{key: getattr(scene, key) for key in ("streams", "stream_tokens", "prompt_tokens")},
        "ttft_s": spread(waits),
        "ttft_alone_s": alone,
        "itl_s": _quantiles(gaps, 50, 99) | {"count": len(gaps)},
        "itl_alone_s": _quantiles(calm, 50, 99) | {"count": len(calm)},
        "urgent": urgent,
        "rss_mb": peak_rss_mb(),
    }


def front(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Of each row: is none at least as good in TTFT and p99 inter-token latency, and better in one?"""
    points = [(row["ttft_s"]["median"], row["itl_s"]["p99"]) for row in rows]
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


@dataclass
class Stage:
    """An engine, requests that come at given moments, and the moments of their tokens."""

    llm: LLM
    text: list[int]
    coming: list[tuple[float, Request]] = field(default_factory=list)
    tokens: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.llm.engine.on_stop, self.llm.engine.patience_s = lambda work, stop: self._enter(), 0.0

    def ask(self, name: str, tokens: int, num_new: int, at: float = 0.0, **about: Any) -> str:
        """A request of so many tokens of text that comes at a moment; its name from now on."""
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        rid = f"{name}-{len(self.tokens)}"
        self.tokens[rid] = []
        self.coming.append((at, Request(rid, self.text[:tokens], params, **about)))
        return rid

    def run(self, is_over: Callable[[], bool]) -> None:
        """Step until something is so; sleep while there is nothing to do."""
        while not is_over():
            self._enter()
            if not self.llm.engine.has_work:
                time.sleep(1e-4)
                continue
            outputs, now = self.llm.engine.step(), time.perf_counter()
            for output in outputs:
                self.tokens[output.rid] += [now] * len(output.new_ids)

    def first_token(self, name: str, tokens: int, at: float | None = None, **about: Any) -> float:
        """Seconds from the moment at which a request comes to its first token."""
        moment = time.perf_counter() if at is None else at
        rid = self.ask(name, tokens, 1, moment, **about)
        self.run(lambda: bool(self.tokens[rid]))
        return self.tokens[rid][0] - moment

    def clear(self, rids: Iterable[str]) -> None:
        """Cancel whoever is left."""
        for rid in rids:
            self.llm.engine.cancel(rid)
        while self.llm.engine.has_work:
            self.llm.engine.step()

    def _enter(self) -> None:
        """Whose moment has come is queued."""
        now = time.perf_counter()
        due = [request for moment, request in self.coming if moment <= now]
        self.coming = [(moment, request) for moment, request in self.coming if moment > now]
        for request in due:
            self.llm.engine.add(request)


def _beside_streams(stage: Stage, scene: Scene, dice: random.Random) -> tuple[float, list[float], list[float]]:
    """TTFT of the long prompt, gaps of the streams before it came, and gaps that overlap its prefill."""
    room = (stage.llm.options.max_model_len or stage.llm.config.max_context) - scene.stream_tokens
    streams = [stage.ask("stream", scene.stream_tokens, room) for _ in range(scene.streams)]
    tokens = stage.tokens
    stage.run(lambda: all(len(tokens[rid]) >= _WARM + _CALM for rid in streams))
    calm = [b - a for rid in streams for a, b in pairwise(tokens[rid][_WARM - 1 :])]
    begun = time.perf_counter() + dice.random() * _PHASE_S
    wait = stage.first_token("long", scene.prompt_tokens, begun)
    # The gaps that its first token fell into end with the streams' next ones.
    ended = begun + wait
    stage.run(lambda: all(tokens[rid][-1] > ended or len(tokens[rid]) == room for rid in streams))
    gaps = [b - a for rid in streams for a, b in pairwise(tokens[rid]) if b > begun and a < ended]
    stage.clear(streams)
    return wait, calm, gaps


def _urgent(
    stage: Stage, scene: Scene, prefill_s: float, dice: random.Random, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What urgent requests wait beyond their own time when they come in the middle of a prefill.

    Their own time is taken anew before each prefill: over minutes a machine's speed drifts by more than they wait.
    """
    own: list[float] = []
    over: list[float] = []
    while len(over) < scene.urgent:
        tell("the urgent request alone")
        own.append(statistics.median([stage.first_token("alone", scene.urgent_tokens) for _ in range(_ALONE + 1)][1:]))
        wish = {"priority": -1, "ttft_slo_s": max(_SLO_S, 3 * own[-1])}
        begun = time.perf_counter()
        long = stage.ask("long", scene.prompt_tokens, 1, begun)
        for part in range(_PER_PREFILL):
            tell(f"urgent requests, {len(over) + 1} of {scene.urgent}")
            moment = max(begun + (part + dice.random()) / _PER_PREFILL * prefill_s, time.perf_counter())
            wait = stage.first_token("urgent", scene.urgent_tokens, moment, **wish)
            if len(over) < scene.urgent and not (stage.tokens[long] and stage.tokens[long][0] <= moment):
                over.append(wait - own[-1])
        stage.clear([long])
    over_s = _quantiles(over, 50, 95) | {"samples": over}
    return {"tokens": scene.urgent_tokens, "own_s": statistics.median(own), "over_s": over_s}


def _quantiles(samples: Sequence[float], *percents: int) -> dict[str, float]:
    """The smallest samples that so many percent of all don't exceed, and the largest of all."""
    ordered = sorted(samples)
    found = {f"p{p}": ordered[max(math.ceil(p / 100 * len(ordered)) - 1, 0)] for p in percents}
    return found | {"max": ordered[-1]}
