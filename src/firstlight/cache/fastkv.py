"""`fastkv`, the part that keeps K/V: once a layer has seen the whole prompt, each KV head keeps what its end looks at.

FastKV (arXiv 2502.01068, section 4.2), whose rule is SnapKV's (arXiv 2404.14469). How many entries stay depends on
`retain_rate` alone, whatever rows `tokens/fastkv.py` lets through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, Keep, ModelFacts, Obs, PartContext, Probe, Retention
from firstlight.kernels.ranking import before_window, best


@dataclass(frozen=True)
class FastKVRetentionConfig:
    """Raises UserError on values that can't be."""

    retain_rate: float = field(
        default=0.1, metadata={"doc": "share of the prompt's K/V that each head keeps for decoding, in (0, 1]; 1 = all"}
    )
    window: int = field(default=8, metadata={"doc": "last prompt rows whose attention decides; they always stay"})
    kernel: int = field(default=7, metadata={"doc": "places over which scores are averaged, an odd number"})

    def __post_init__(self) -> None:
        if not 0 < self.retain_rate <= 1:
            raise UserError(f"fastkv: retain_rate={self.retain_rate} is no share; give more than 0, at most 1")


class FastKVRetention(Retention):
    """The cache part: at the end of a prompt, in layers that read all tokens. Window layers forget by themselves."""

    Config = FastKVRetentionConfig
    identity: ClassVar = {"retain_rate": 1.0}
    trial: ClassVar = {"retain_rate": 0.2}
    capability = Capability(exact=False, alters_cells=False, last_rows=8)

    def __init__(self, config: FastKVRetentionConfig) -> None:
        self.config = config
        self.layers: set[int] = set()
        self.capability = replace(self.capability, last_rows=config.window)
        if config.retain_rate == 1:
            self.capability = Capability(exact=True, alters_cells=False)

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        self.layers = set() if self.config.retain_rate == 1 else set(model.full_layers)

    def probe(self, layer: int) -> Probe | None:
        return Probe(self.config.window) if layer in self.layers else None

    def after_layer(
        self, layer: int, tok: Tensor, length: Sequence[int], obs: Obs | None, ctx: PartContext
    ) -> Keep | None:
        """Of each head int(T retain_rate) entries stay: the window's, and those with most of its attention."""
        if obs is None:
            return None
        window, num_entries = self.config.window, obs.colsum.shape[1]
        capacity = max(int(ctx.prompt_len * self.config.retain_rate), window)
        ctx.notes["kept"] = min(capacity, num_entries)
        if num_entries <= capacity:
            return None
        chosen = best(before_window(obs.colsum, window, self.config.kernel), capacity - window)
        return Keep([head.nonzero().flatten() for head in pad(chosen, (0, window), value=True)])
