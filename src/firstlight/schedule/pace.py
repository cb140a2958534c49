"""How long a prefill will take: two rates that a schedule fits out of the events and keeps in its memo.

seconds = a * rows + b * reads. Rows go through all layers (a row through half of them is half a row), reads are rows
times the keys before them, on average. Both rates are positive, so nothing runs wild beyond the lengths that were seen,
as a polynomial in the number of tokens does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from firstlight.core.schedule import Segment
from firstlight.core.view import RequestView

_HALF_LIFE_S = 30.0
"""After so many seconds of further prefills an observation counts half: a machine's speed changes."""
_APART = 1e-4
"""Observations of one kind only can't tell the two rates apart."""


@dataclass(frozen=True)
class Work:
    """Rows through all layers, and the keys they read."""

    rows: float = 0.0
    reads: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.rows + other.rows, self.reads + other.reads)


@dataclass(frozen=True)
class Pace:
    """Least squares, each prefill weighed by 1 / s: a long one counts as much as the short ones of the same time.

    `sums` of r * r / s, r * k / s, k * k / s, r, k, with r rows and k reads that took s seconds.
    """

    sums: tuple[float, ...] = (0.0,) * 5

    @classmethod
    def of(cls, memo: Sequence[float] | None) -> Pace:
        return cls(tuple(memo)) if memo else cls()

    def after(self, work: Work, seconds: float) -> Pace:
        """With one more observation."""
        if seconds <= 0 or work.rows <= 0:
            return self
        r, k, kept = work.rows, work.reads, 0.5 ** (seconds / _HALF_LIFE_S)
        seen = (r * r / seconds, r * k / seconds, k * k / seconds, r, k)
        return Pace(tuple(kept * old + new for old, new in zip(self.sums, seen)))

    def seconds(self, work: Work) -> float:
        """Predicted; 0 before anything was seen."""
        a, b = self._rates()
        return a * work.rows + b * work.reads

    def _rates(self) -> tuple[float, float]:
        rr, rk, kk, r, k = self.sums
        if not rr or not kk:
            return 0.0, 0.0
        apart = rr * kk - rk * rk
        if apart > _APART * rr * kk:
            a, b = (r * kk - k * rk) / apart, (k * rr - r * rk) / apart
            if a >= 0 and b >= 0:
                return a, b
        return (r / rr, 0.0) if r * r * kk >= k * k * rr else (0.0, k / kk)


def work_between(t0: int, t1: int, share: float = 1.0) -> Work:
    """The tokens [t0, t1) of a prompt, through a share of the layers."""
    return Work(share * (t1 - t0), share * (t1 * t1 - t0 * t0) / 2)


def work_of(segment: Segment, num_layers: int) -> Work:
    """What a prefill segment is."""
    return work_between(*segment.tok, (segment.layer[1] - segment.layer[0]) / num_layers)


def work_left(request: RequestView) -> Work:
    """What a request's prompt still takes. Before it is admitted, what it brings is an estimate."""
    known = request.n_tokens - request.n_uncached if request.is_waiting else 0
    layers = len(request.f)
    return sum((work_between(max(known, n), request.n_tokens, 1 / layers) for n in request.f), Work())
