"""Layers whose calls of kernels are all noted before the first one is made (kernels/tape.py, decision 0020).

Where nothing but kernels touches memory, Python decides several layers of a pass while its own code is in the caches.
The calls are then made stretch by stretch, with the stops of a pass that makes them one by one: as many in a row as go
by before somebody wants to look.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from firstlight.core.schedule import YieldAt
from firstlight.engine.batch import Batch
from firstlight.engine.work import Stop
from firstlight.kernels.tape import Bell, Own, Tape, holding

_MOST_CALLS, _FEW_CALLS = 1024, 512
"""Noted at a time, but for whole layers; few where somebody may wait: for 7 us of Python each nothing stops."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A layer's calls [begin, end) of a tape: with addresses of theirs those of all layers of its form."""

    layer: int
    own: Own
    tape: Tape
    begin: int
    end: int
    stops: list[tuple[Stop, int]]
    """Each stop, and how many of the calls come before it."""


class Held:
    """A batch's next layers, noted: as many of `layers` as make the most calls, by those so far.

    It is one where something is decided at its end: rows leave, K/V are dropped, blocks behind a window are freed.
    """

    def __init__(
        self,
        batch: Batch,
        layers: range,
        waits: bool,
        compute: Callable[[int], Iterator[Stop]],
        own: Callable[[int], Own] | None = None,
    ) -> None:
        """`waits`: the unit may be told to wait at any stop; `compute`: a layer's calls, with its stops.

        `own`: what these have of the layer's own. Then only the batch's first layer of each form is computed: those of
        the same form make its calls with addresses of theirs.
        """
        self.repeated: dict[int, list[int]] = {}
        """By layer that was computed, those that make its calls."""
        self._most = _FEW_CALLS if waits else _MOST_CALLS
        self.end = layers.start
        """The layer after them."""
        self._noted: list[tuple[Stop, int]] = []
        """Each stop, and how many calls come before it."""
        with holding(batch.memory) as self._tape:
            while self.end < layers.stop and (
                self.end == layers.start or (batch.is_foreseen and self._room(layers) > 0)
            ):
                if self._noted:
                    self._raise("layer")
                mine = None if own is None else own(self.end)
                if own is not None and mine is not None and mine.form in batch.noted:
                    self._repeat(batch.noted[mine.form], mine, own, layers)
                    continue
                begin, first = len(self._tape), len(self._noted)
                self._note(compute(self.end))
                if mine is not None:
                    stops = [(stop, calls - begin) for stop, calls in self._noted[first:]]
                    batch.noted[mine.form] = Noted(self.end, mine, self._tape, begin, len(self._tape), stops)
                self.end += 1

    def stretches(self, bell: Bell) -> Iterator[list[tuple[Stop, float]]]:
        """Make the calls till the bell rings, again and again: each stop, and the seconds before it."""
        stops, ends = zip(*self._noted)
        begin = done = 0
        while done < len(ends):
            seconds = self._tape.timed(begin, ends[done:], bell)
            passed = list(zip(stops[done:], seconds))
            done += len(seconds)
            begin = ends[done - 1]
            yield passed

    def _note(self, stops: Iterator[Stop]) -> None:
        for stop in stops:
            if not self._noted or len(self._tape) > self._noted[-1][1]:
                self._noted.append((stop, len(self._tape)))
            else:  # nothing is to be done since the last one
                self._raise(stop.level)

    def _repeat(self, noted: Noted, mine: Own, own: Callable[[int], Own], layers: range) -> None:
        """A layer's calls, for the next one, whose own is `mine`, and for those behind it of the same form that fit."""
        each, before, most = noted.end - noted.begin, len(self._tape), max(1, self._room(layers))
        last = min(self.end + most, layers.stop)
        alike = [mine, *itertools.takewhile(lambda other: other.form == mine.form, map(own, range(self.end + 1, last)))]
        self._tape.repeat(noted.tape, noted.begin, noted.end, noted.own.addresses, [a.addresses for a in alike])
        for layer in range(self.end, self.end + len(alike)):
            if layer > self.end:
                self._raise("layer")
            self._noted += [(Stop(s.level, layer, s.op, s.work), before + calls) for s, calls in noted.stops]
            before += each
        self.repeated.setdefault(noted.layer, []).extend(range(self.end, self.end + len(alike)))
        self.end += len(alike)

    def _room(self, layers: range) -> int:
        """How many more fit, as large as those so far."""
        count, calls = self.end - layers.start, len(self._tape)
        return self._most * count // calls - count if calls else 0

    def _raise(self, level: YieldAt) -> None:
        """The last stop is of this level, too."""
        stop, calls = self._noted[-1]
        self._noted[-1] = Stop(level, stop.layer, stop.op, stop.work), calls
