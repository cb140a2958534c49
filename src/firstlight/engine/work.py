"""A work unit under way, as the engine sees it: whose it is, where it stops, what it leaves.

`engine/forward.py` computes it, or `engine/steady.py` does again what was recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from firstlight.core.schedule import WorkUnit, YieldAt
from firstlight.engine.live import LiveRequest

if TYPE_CHECKING:
    from firstlight.engine.cuts import CutTaken


class Stop(NamedTuple):
    """A place where a pass can wait: after an operator or a slice of one."""

    level: YieldAt
    layer: int
    op: str
    work: float = 0.0
    """Operations of its kind (`op`) since the last stop, where that is a measure of speed."""


class Work(ABC):
    """After `run` ended: `logits` of requests that sample, `cuts` that were taken. `lives` are the segments'."""

    def __init__(self, unit: WorkUnit, lives: Sequence[LiveRequest]) -> None:
        self.unit, self.lives = unit, lives
        self.logits: dict[str, Tensor] = {}
        self.cuts: list[CutTaken] = []

    @property
    def is_abandoned(self) -> bool:
        """Nobody waits for this pass any more."""
        return all(live.cancelled for live in self.lives)

    @abstractmethod
    def run(self) -> Generator[Stop, None, None]:
        """From stop to stop; closing it is a cancellation."""
