"""`llmlingua`: tokens that the model itself would have predicted leave a text (arXiv 2310.05736, section 3.2).
Examples to learn from, code with long names and what is to be counted lose most by it (arXiv 2604.02985): such text
belongs into the question, which stays as it is.

A text is read in segments. A token's surprisal is -log p given its segment so far and the already shortened text before
it; of each segment the most surprising tokens stay, its share of the budget, and always its first one. The quantile is
the segment's own, as in the paper. Where the paper scores with a small second model, this takes the first layers of the
model that answers and looks at them through its head (logit lens), among the tokens that the text itself has: the whole
model scores better, but then the compression costs as much as the prefill that it saves. With `when=pays` a prompt is
left as it is where shortening it would take longer (`breakeven.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts, PromptEdit, PromptIds, Scorer
from firstlight.prompt.breakeven import Curves
from firstlight.prompt.shorten import Budget, Shortener, shares


@dataclass(frozen=True)
class LLMLinguaConfig(Budget):
    """The budget, and what scores."""

    layers: str = field(default="6", metadata={"doc": "layers of the model that score: a number, or all"})
    digits: bool = field(default=False, metadata={"doc": "let tokens with digits go last, however predictable"})
    segment: int = field(default=200, metadata={"doc": "tokens that are scored and thinned together"})
    when: str = field(
        default="always",
        metadata={
            "doc": "always; or pays: only prompts that it serves faster, as `firstlight calibrate` measured here"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != "all" and not (self.layers.isascii() and self.layers.isdigit() and int(self.layers) > 0):
            raise UserError(f"layers={self.layers!r} is out of range; give 1 or more, or all")
        if self.segment < 1:
            raise UserError(f"segment={self.segment} is out of range; give 1 or more tokens")
        if self.when not in ("always", "pays"):
            raise UserError(f"when={self.when!r} is out of range; choose always or pays")


class LLMLingua(Shortener):
    """The prompt part."""

    Config = LLMLinguaConfig
    capability = replace(Shortener.capability, calibration=True)
    trial: ClassVar = {"layers": "2", "segment": 40}
    config: LLMLinguaConfig
    _layers: int | None = None
    """None = the whole model."""
    _curves: Curves | None = None
    """None = shorten whatever it costs."""
    _longest = 0

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        """A model of fewer layers than asked for is refused; the default takes what there is."""
        if self.config.when == "pays":
            self._curves, self._longest = self._measured(model, calibration), model.max_len
        if self.config.layers == "all":
            return
        layers, default = int(self.config.layers), int(LLMLinguaConfig.layers)
        if layers > model.num_layers and layers != default:
            raise UserError(f"layers={layers}: the model has {model.num_layers}; give as many at most, or all")
        self._layers = layers if layers < model.num_layers else None

    def edit(self, req: PromptIds, score: Scorer) -> PromptEdit:
        """As every compressor's, if it pays."""
        context = sum(hi - lo for lo, hi in req.context)
        rate = sum(self.config.counts([hi - lo for lo, hi in req.context])) / max(context, 1)
        curves, whole = self._curves, len(req.ids)
        if curves is None or rate == 1 or curves.pays(whole, context, rate, req.max_tokens, req.known):
            return super().edit(req, score)
        return PromptEdit(req.ids, range(whole), [(0, whole)], self._why_not(curves, req, context, rate))

    def _why_not(self, curves: Curves, req: PromptIds, context: int, rate: float) -> str:
        """For the report."""
        short = curves.shortened(len(req.ids), context, rate, req.max_tokens)
        whole = curves.whole(len(req.ids), req.max_tokens, req.known)
        first = curves.pays_from(rate, req.max_tokens, self._longest)
        known = f", {req.known:,} tokens being known" if req.known else ""
        return (
            f"shortening doesn't pay: {short:.3g} s with it, {whole:.3g} s without{known}, "
            "for prompt and answer as measured; "
            + ("it never does on this model" if first is None else f"it does from {first:,} tokens on")
        )

    def _measured(self, model: ModelFacts, found: Calibration | None) -> Curves:
        """The curves of this machine. Raises UserError where there are none."""
        wanted = f"layers={self.config.layers},segment={self.config.segment}"
        make = f"make one with `firstlight calibrate MODEL llmlingua:{wanted}`, under the settings of the run"
        if found is None:
            raise UserError(f"llmlingua:when=pays goes by a calibration, and there is none; {make}")
        of = ",".join(f"{key}={found.settings.get(key)}" for key in ("layers", "segment"))
        if of != wanted:
            raise UserError(f"the calibration {found.path} is of {of}; {make}")
        if (where := found.value("machine", str)) != model.machine:
            raise UserError(f"the calibration {found.path} was made elsewhere ({where}; here: {model.machine}); {make}")
        sizes = {"prefill": 3, "step": 2, "shorten": 4}
        curves = {key: found.value(key, list) for key in sizes}
        if any(len(curves[key]) != size or not all(map(_is_time, curves[key])) for key, size in sizes.items()):
            raise UserError(f"the calibration {found.path} is damaged; {make}")
        return Curves(**curves)

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


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def most_surprising(nll: Sequence[float], count: int) -> list[int]:
    """The first place and those of the largest values, `count` in all but at least the first; ascending."""
    rest = sorted(range(1, len(nll)), key=lambda place: (-nll[place], place))
    return sorted([0, *rest[: max(count - 1, 0)]])
