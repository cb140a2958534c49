"""`llmlingua`: tokens that the model itself would have predicted leave a text (arXiv 2310.05736, section 3.2).

A text is read in segments. A token's surprisal is -log p given its segment so far and the already shortened text before
it; of each segment the most surprising tokens stay, its share of the budget, and always its first one. The quantile is
the segment's own, as in the paper. Where the paper scores with a small second model, this takes the first layers of the
model that answers and looks at them through its head (logit lens), among the tokens that the text itself has: the whole
model scores better, but then the compression costs as much as the prefill that it saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts, PromptIds, Scorer
from firstlight.prompt.shorten import Budget, Shortener, shares


@dataclass(frozen=True)
class LLMLinguaConfig(Budget):
    """The budget, and what scores."""

    layers: str = field(default="6", metadata={"doc": "layers of the model that score: a number, or all"})
    digits: bool = field(default=False, metadata={"doc": "let tokens with digits go last, however predictable"})
    segment: int = field(default=200, metadata={"doc": "tokens that are scored and thinned together"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != "all" and not (self.layers.isascii() and self.layers.isdigit() and int(self.layers) > 0):
            raise UserError(f"layers={self.layers!r} is out of range; give 1 or more, or all")
        if self.segment < 1:
            raise UserError(f"segment={self.segment} is out of range; give 1 or more tokens")


class LLMLingua(Shortener):
    """The prompt part."""

    Config = LLMLinguaConfig
    trial: ClassVar = {"layers": "2", "segment": 40}
    config: LLMLinguaConfig
    _layers: int | None = None
    """None = the whole model."""

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        """A model of fewer layers than asked for is refused; the default takes what there is."""
        if self.config.layers == "all":
            return
        layers, default = int(self.config.layers), int(LLMLinguaConfig.layers)
        if layers > model.num_layers and layers != default:
            raise UserError(f"layers={layers}: the model has {model.num_layers}; give as many at most, or all")
        self._layers = layers if layers < model.num_layers else None

    def keep(self, ids: Sequence[int], count: int, req: PromptIds, score: Scorer) -> Sequence[int]:
        """Segment after segment; ties go to the earlier token."""
        segment, share = self.config.segment, count / len(ids)
        bounds = [(lo, min(lo + segment, len(ids))) for lo in range(0, len(ids), segment)]
        among = None if self._layers is None else sorted(set(ids))
        kept: list[int] = []
        for (lo, hi), room in zip(bounds, shares([hi - lo for lo, hi in bounds], share)):
            before = [ids[place] for place in kept]
            nll = score.nll([*before, *ids[lo:hi]], first=len(before), layers=self._layers, among=among)
            if self.config.digits:
                has = [any(map(str.isdigit, req.text([token]))) for token in ids[lo:hi]]
                nll = [math.inf if digit else surprise for surprise, digit in zip(nll, has)]
            kept += [lo + place for place in most_surprising(nll, room)]
        return kept


def most_surprising(nll: Sequence[float], count: int) -> list[int]:
    """The first place and those of the largest values, `count` in all but at least the first; ascending."""
    rest = sorted(range(1, len(nll)), key=lambda place: (-nll[place], place))
    return sorted([0, *rest[: max(count - 1, 0)]])
