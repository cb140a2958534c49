"""Stop strings: where an answer's text ends, and what of it is certain enough to be shown.

Between the detokenizer and a reader. Text that may become a stop string is held back, so none of it is ever shown.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """One answer's text on its way out. What comes out doesn't depend on the pieces in which the text came."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str, may_stop: bool = True) -> str:
        """The text that is certain now. After `matched` is set there is no more.

        The stop that ends first counts, the longer of two that end together. Without `may_stop`, those that end in this
        piece don't count and are text.
        """
        if not self._stops:
            return piece
        known, text = len(self._held), self._held + piece
        self._held = ""
        if may_stop and (found := self._first(text, known)):
            end, self.matched = found
            return text[: end - len(self.matched)]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and never became a stop."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str, known: int) -> tuple[int, str] | None:
        """Where the first stop ends that isn't wholly in the `known` characters, and which it is."""
        starts = [(text.find(stop, max(known - len(stop) + 1, 0)), stop) for stop in self._stops]
        ends = [(at + len(stop), stop) for at, stop in starts if at >= 0]
        return min(ends, key=lambda found: (found[0], -len(found[1])), default=None)

    def _undecided(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = min(max((len(stop) - 1 for stop in self._stops), default=0), len(text))
        may = (k for k in range(longest, 0, -1) if any(stop.startswith(text[len(text) - k :]) for stop in self._stops))
        return next(may, 0)
