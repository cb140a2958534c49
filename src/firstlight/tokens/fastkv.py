"""`fastkv`: behind one layer only the tokens that the prompt's end looks at go on; each head keeps the K/V it looks at.

FastKV (arXiv 2502.01068). This part is its token-selective propagation: up to layer `tsp_idx` every row is computed,
then the rows with most attention from the last `window` rows go on. Which K/V stay for decoding is for the other part,
`cache/fastkv.py`: what this one saves is prefill time, what that one saves is memory and decode time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, Cut, ModelFacts, Obs, PartContext, Probe, RowPolicy
from firstlight.kernels.ranking import before_window, best


@dataclass(frozen=True)
class FastKVRowsConfig:
    """Raises UserError on values that can't be."""

    tsp_idx: int | None = field(
        default=None,
        metadata={"doc": "last layer (from 0) that all rows go through; default: as calibrated, else half the depth"},
    )
    tsp_rate: float = field(default=0.2, metadata={"doc": "share of the prompt's rows that go on, in (0, 1]; 1 = all"})
    window: int = field(default=8, metadata={"doc": "last prompt rows whose attention decides; they always stay"})
    kernel: int = field(default=7, metadata={"doc": "places over which scores are averaged, an odd number"})

    def __post_init__(self) -> None:
        if not 0 < self.tsp_rate <= 1:
            raise UserError(f"fastkv: tsp_rate={self.tsp_rate} is no share of the rows; give more than 0, at most 1")
        if not 1 <= self.window <= 128:
            raise UserError(f"fastkv: window={self.window} rows can't be probed; give 1 to 128")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"fastkv: kernel={self.kernel} has no middle; give an odd number")


class FastKVRows(RowPolicy):
    """The tokens part: one barrier, one cut."""

    Config = FastKVRowsConfig
    prompt_only = True
    identity: ClassVar = {"tsp_rate": 1.0}
    trial: ClassVar = {"tsp_idx": 1, "tsp_rate": 0.3}
    capability = Capability(exact=False, prefix_stable=False, last_rows=8, calibration=True)

    def __init__(self, config: FastKVRowsConfig) -> None:
        self.config = config
        self.layer = config.tsp_idx
        self.capability = replace(self.capability, last_rows=config.window)
        if config.tsp_rate == 1:
            self.capability = Capability(exact=True, alters_cells=False, calibration=True)

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        full = model.full_layers
        if not full:
            raise UserError("fastkv needs a layer that reads all tokens; every layer of this model has a window")
        if self.layer is None and calibration is not None:
            self.layer = calibration.value("tsp_idx", int)
        if self.layer is None:
            middle = model.num_layers // 2 - 1
            self.layer = min(full, key=lambda layer: abs(layer - middle))
        if self.layer not in full:
            choices = f"0 to {full[-1]}" if len(full) == model.num_layers else ", ".join(map(str, full))
            raise UserError(f"fastkv: tsp_idx={self.layer} is no layer of this model that reads all; choose {choices}")

    def barriers(self) -> tuple[int, ...]:
        return () if self.config.tsp_rate == 1 or self.layer is None else (self.layer,)

    def probe(self, layer: int) -> Probe | None:
        return Probe(self.config.window) if layer in self.barriers() else None

    def at_barrier(self, layer: int, tok: Tensor, obs: Obs | None, ctx: PartContext) -> Cut:
        """Of rows i64 [n] int(T tsp_rate) go on: the window's, and those with most of its attention."""
        assert obs is not None, "it was probed"
        window = self.config.window
        count = max(int(ctx.prompt_len * self.config.tsp_rate), window)
        ctx.notes |= {"tsp_idx": layer, "rows": min(count, len(tok))}
        if len(tok) <= count:
            ctx.notes["why"] = f"the prompt is so short that all its {len(tok)} rows go on"
            return Cut(keep=tok)
        before, end = tok[:-window], tok[-window:]
        score = before_window(obs.colsum.sum(0, keepdim=True), window, self.config.kernel)[0]
        rows = torch.searchsorted(obs.tok[0], before)
        return Cut(keep=torch.cat([before[best(score[rows], count - window)], end]))
