"""`blasst`: rows skip key blocks whose scores lie far below what they have seen (BLASST, arXiv 2512.12087).

Nothing is planned: every block is listed, and a threshold goes with the plan. A row skips a block where its highest
score there is more than -ln(lambda) below the highest one before it: what it drops weighs less than lambda each. Rows
vote for themselves, unlike the paper's, so a row's result is its own; the kernel saves work where all rows of its tile
skip. lambda = scale / length, since at a fixed lambda longer prompts would skip more; `scale` follows from the share of
blocks that rows should skip, by what `firstlight calibrate` found for the model and the order of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from firstlight.core.attn import DENSE, AttnPlan, PlanContext, Planner
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, ModelFacts
from firstlight.kernels.kv_layout import BLOCK

Q_TILE = 128
"""Rows of a plan tile: a multiple of every kernel's own tile."""
HIGHEST = 0.999
"""No lambda is more: at 1 a block nearly as good as the best one might go."""
SCANS = ("asc", "desc", "sink-then-desc")
"""Orders of blocks, by their numbers in a plan."""
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class BlasstConfig:
    """Raises UserError on values that mean nothing."""

    sparsity: float = field(default=0.5, metadata={"doc": "share of the key blocks that rows skip, by the calibration"})
    scale: float | None = field(
        default=None, metadata={"doc": "lambda times the length, in place of the calibration's"}
    )
    scan: str = field(default="asc", metadata={"doc": f"order in which blocks are looked at: {', '.join(SCANS)}"})
    decode: bool = field(default=True, metadata={"doc": "for generated tokens too"})

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"blasst: sparsity={self.sparsity} can't be; give at least 0, less than 1")
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise UserError(f"blasst: scale={self.scale} can't be; give 0 or more")
        if self.scan not in SCANS:
            raise UserError(f"blasst: scan={self.scan!r} is unknown; choose {' or '.join(SCANS)}")


class Blasst(Planner):
    """The attention part. lambda depends on the whole prompt's length, so what a prefix gave is not used again."""

    name = "blasst"
    seam = "attention"
    Config = BlasstConfig
    identity: ClassVar = {"sparsity": 0.0}
    trial: ClassVar = {"sparsity": 0.6}
    capability = Capability(prefix_stable=False, calibration=True)

    def __init__(self, config: BlasstConfig) -> None:
        self.config, self.prompt_only = config, not config.decode
        self._scale = dict.fromkeys(PHASES, config.scale or 0.0)

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        config = self.config
        if config.scale is not None or config.sparsity == 0:
            return
        if calibration is None:
            raise UserError(
                "blasst needs to know what this model's scores are like; find out with `firstlight calibrate MODEL "
                "blasst`, or give scale=..."
            )
        fitted: Any = calibration.value("scans", dict).get(config.scan, {})
        for phase in PHASES:
            if not (isinstance(fit := fitted.get(phase), dict) and {"a", "b"} <= fit.keys()):
                raise UserError(
                    f"the calibration {calibration.path} has no {phase} for scan={config.scan}; make another"
                )
            self._scale[phase] = fit["a"] * math.exp(fit["b"] * config.sparsity)

    @staticmethod
    def sample(model: ModelFacts) -> dict[str, Any]:
        """Scales for a check on a model that has none."""
        return {"scans": {scan: {phase: {"a": 10.0, "b": 3.0} for phase in PHASES} for scan in SCANS}}

    def threshold(self, length: int, decode: bool) -> float:
        """ln(lambda) for requests of this length; -inf = nothing is skipped."""
        share = min(self._scale[PHASES[decode]] / length, HIGHEST)
        return math.log(share) if share > 0 else -math.inf

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """All, with a threshold; None (dense) where there is none. The length is the prompt's, not the chunk's."""
        below = self.threshold(max(ctx.prompt_len, int(ctx.tok[-1]) + 1), ctx.is_decode)
        if below == -math.inf:
            return None
        first = int(ctx.tok[0]) // Q_TILE
        tiles, heads = int(ctx.tok[-1]) // Q_TILE - first + 1, ctx.q.shape[1]
        return AttnPlan(
            q_tile=Q_TILE,
            blk=BLOCK,
            head_map=torch.zeros(heads, dtype=torch.int16),
            tile_base=torch.tensor([0, tiles], dtype=torch.int32),
            tile_first=torch.tensor([first], dtype=torch.int32),
            tile_map=torch.zeros(tiles, dtype=torch.int32),
            band=torch.tensor([[0, DENSE]], dtype=torch.int32),
            skip_log=torch.full((1, heads), below),
            scan=SCANS.index(self.config.scan),
        )
