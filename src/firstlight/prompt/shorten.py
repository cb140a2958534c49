"""What all prompt compressors share: the budget, and a prompt put together again of what stays.

A compressor says which tokens of one text stay, and how many those are is not its business. Between the tokenizer and
admission. Ids are taken out and never made anew from text, so nothing can be forged by what is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, PromptEdit, PromptEditor, PromptIds, Range, Scorer


@dataclass(frozen=True)
class Budget:
    """How much of a prompt's context stays. Raises UserError on shares and counts that can't be."""

    rate: float = field(default=0.5, metadata={"doc": "share of the context's tokens that stays, of each text alike"})
    target_token: int | None = field(
        default=None, metadata={"doc": "tokens of context that stay at most, in the place of `rate`"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise UserError(f"rate={self.rate:g} is out of range; give more than 0 and at most 1, which keeps all")
        if self.target_token is not None and self.target_token < 1:
            raise UserError(f"target_token={self.target_token} is out of range; give 1 or more")

    def counts(self, lengths: Sequence[int]) -> list[int]:
        """Tokens that stay of each text. A text's count depends on those before it only, as a prefix cache needs."""
        total = max(sum(lengths), 1)
        share = self.rate if self.target_token is None else min(self.target_token / total, 1.0)
        return shares(lengths, share)


def shares(lengths: Sequence[int], share: float) -> list[int]:
    """The share of each length, rounded so that sums from the start are off by half a token at most."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    rounded = [int(share * end + 0.5) for end in ends]
    return [after - before for before, after in pairwise(rounded)]


class Shortener(PromptEditor, ABC):
    """A compressor: derive from it, set `Config` to a `Budget` and say in `keep` what stays of one text."""

    capability = Capability(exact=False)
    identity: ClassVar = {"rate": 1.0}

    def __init__(self, config: Budget) -> None:
        self.config = config

    @abstractmethod
    def keep(self, ids: Sequence[int], count: int, req: PromptIds, score: Scorer) -> Sequence[int]:
        """Places in `ids`, one text of the context, that stay: `count` of them, ascending."""

    def edit(self, req: PromptIds, score: Scorer) -> PromptEdit:
        """Everything but context, and of each text of the context what `keep` chooses."""
        counts = self.config.counts([hi - lo for lo, hi in req.context])
        keep_map: list[int] = []
        protected: list[Range] = []
        done = 0
        for (lo, hi), count in zip(req.context, counts):
            protected.append((len(keep_map), len(keep_map) + lo - done))
            keep_map += range(done, lo)
            keep_map += self._chosen(req, (lo, hi), count, score)
            done = hi
        protected.append((len(keep_map), len(keep_map) + len(req.ids) - done))
        keep_map += range(done, len(req.ids))
        ids = [req.ids[place] for place in keep_map]
        return PromptEdit(ids, keep_map, [(lo, hi) for lo, hi in protected if lo < hi])

    def _chosen(self, req: PromptIds, span: Range, count: int, score: Scorer) -> list[int]:
        """Places in the prompt that stay of one text."""
        lo, hi = span
        if count in (0, hi - lo):
            return list(range(lo, lo + count))
        return [lo + place for place in self.keep(req.ids[lo:hi], count, req, score)]
