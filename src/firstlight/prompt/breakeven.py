"""When a shorter prompt is the faster one: time as curves over tokens, and from which length on shortening pays.

Shortening is a prefill of its own. It pays only where it takes less than the prefill and the generated tokens that it
spares (the finding of arXiv 2604.02985, whose profiler isn't published: these curves are ours). They are measured by
`firstlight calibrate` (`train/llmlingua.py`); a compressor asks them before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.05
"""Share of the time that must be won, for what the curves don't know."""


@dataclass(frozen=True)
class Curves:
    """Seconds over numbers of tokens. All coefficients are 0 or more."""

    prefill: Sequence[float]
    """Of n tokens: 1, n, n^2."""
    step: Sequence[float]
    """Of one token that is generated behind n others: 1, n."""
    shorten: Sequence[float]
    """Of n tokens of which the share r stays: 1, n, r n, r n^2."""

    def whole(self, prompt: float, generated: int, known: int = 0) -> float:
        """Of a prompt as it is, with all its answer; cells of its first `known` tokens are there."""
        (p0, p1, p2), (d0, d1) = self.prefill, self.step
        return p0 + p1 * (prompt - known) + p2 * (prompt**2 - known**2) + generated * (d0 + d1 * prompt)

    def shortened(self, prompt: float, context: float, rate: float, generated: int) -> float:
        """The same with `rate` of its `context` tokens kept, shortening included; no cell of it is known."""
        s0, s1, s2, s3 = self.shorten
        effort = s0 + s1 * context + s2 * rate * context + s3 * rate * context**2
        return effort + self.whole(prompt - (1 - rate) * context, generated)

    def pays(self, prompt: float, context: float, rate: float, generated: int, known: int = 0) -> bool:
        whole = self.whole(prompt, generated, known)
        return self.shortened(prompt, context, rate, generated) < (1 - MARGIN) * whole

    def pays_from(self, rate: float, generated: int, longest: int) -> int | None:
        """Tokens of the shortest prompt, all of it context, that shortening to `rate` serves; None up to `longest`.

        Won time is a parabola through something below 0, so it is the first place at which that is 0.
        """
        (p0, p1, p2), (d0, d1), (s0, s1, s2, s3) = self.prefill, self.step, self.shorten
        a = -MARGIN * (p0 + generated * d0) - s0
        b = (1 - MARGIN - rate) * (p1 + generated * d1) - s1 - rate * s2
        c = (1 - MARGIN - rate**2) * p2 - rate * s3
        inside = b * b - 4 * a * c
        if inside < 0 or (b <= 0 and c <= 0):
            return None
        root = math.sqrt(inside)
        first = math.floor(-2 * a / (b + root) if b > 0 else (root - b) / (2 * c)) + 1
        return first if first <= longest else None
