"""`band`: each row reads the first `sink` tokens and the last `window` tokens before it, itself included.

The shape is the attention sink of StreamingLLM (arXiv 2309.17453, section 3.2) and the A-shape of MInference (arXiv
2407.02490, section 3.2). It looks at no key, so it costs nothing to plan and doesn't depend on how a prompt is
chunked: the control that every method which does look must beat at the same density.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.kernels.kv_layout import BLOCK

Q_TILE = 128
"""Rows of a plan tile: a multiple of every kernel's own tile."""


@dataclass(frozen=True)
class BandConfig:
    """Sizes in tokens. Raises UserError on values that no row can have."""

    sink: int = field(default=64, metadata={"doc": "tokens at the start of the prompt that every row reads"})
    window: int = field(default=1024, metadata={"doc": "last tokens that a row reads, its own included"})

    def __post_init__(self) -> None:
        for key, least in (("sink", 0), ("window", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise UserError(f"band: {key}={value!r} is no number of tokens; give a whole number from {least} up")


class Band(Planner):
    """The attention part of `band`: one slot, one list, no blocks."""

    name = "band"
    seam = "attention"
    Config = BandConfig
    by_place = True
    identity: ClassVar = {"window": 1 << 20}
    trial: ClassVar = {"sink": 4, "window": 40}
    capability = Capability(exact=False, prefix_stable=True, chunk_invariant=True)

    def __init__(self, config: BandConfig) -> None:
        self.config = config

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """The band for every tile of the pass; None (dense) when it covers the whole prompt and these rows.

        The prompt decides, not the chunk: so a row is dense or banded wherever a chunk happens to end.
        """
        sink, window = self.config.sink, self.config.window
        if max(int(ctx.pos.max()) + 1, ctx.prompt_len) <= sink + window:
            return None
        first, last = int(ctx.tok[0]) // Q_TILE, int(ctx.tok[-1]) // Q_TILE
        tiles = last - first + 1
        return AttnPlan(
            q_tile=Q_TILE,
            blk=BLOCK,
            head_map=torch.zeros(ctx.q.shape[1], dtype=torch.int16),
            tile_base=torch.tensor([0, tiles], dtype=torch.int32),
            tile_first=torch.tensor([first], dtype=torch.int32),
            tile_map=torch.zeros(tiles, dtype=torch.int32),
            band=torch.tensor([[sink, window]], dtype=torch.int32),
        )
