"""`truncate`: the last tokens of each text stay. It looks at nothing: a control that every compressor must beat."""

from __future__ import annotations

from collections.abc import Sequence

from firstlight.core.parts import PromptIds, Scorer
from firstlight.prompt.shorten import Budget, Shortener


class Truncate(Shortener):
    """The prompt part."""

    Config = Budget

    def keep(self, ids: Sequence[int], count: int, req: PromptIds, score: Scorer) -> Sequence[int]:
        return range(len(ids) - count, len(ids))
