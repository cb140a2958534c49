"""`trishape`: rows read the first and the last tokens, but those at the prompt's end, which answer, read everything.

Tri-shape of SCBench (arXiv 2412.10319): an A-shape with a dense tail. It looks at no key. In mode `strict` a
row's window is its own. Mode `openvino` is the block skipping of OpenVINO GenAI: the window is measured from where the
chunk begins, in blocks of the cache; the chunk reads all of itself; where less than the tail follows it, it is dense.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from firstlight.attention.grid import Grid
from firstlight.core.attn import DENSE, AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.kernels.kv_layout import BLOCK

MODES = ("strict", "openvino")
Q_TILE = 16
"""Rows that begin the tail together: few, since dense rows are dear, and whole tiles of the kernels."""
CHUNK = 256
"""OpenVINO GenAI's own chunk length."""


@dataclass(frozen=True)
class TriShapeConfig:
    """Sizes in tokens; defaults are OpenVINO GenAI's. Raises UserError on values that can't be."""

    sink: int = field(default=128, metadata={"doc": "tokens at the start of the prompt that every row reads"})
    window: int = field(default=1920, metadata={"doc": "last tokens that a row reads, its own included"})
    tail: int = field(
        default=100, metadata={"doc": "last prompt rows that read everything; up to 15 before them do, to fill a tile"}
    )
    mode: str = field(
        default="strict",
        metadata={"doc": "strict: exactly that, however the prompt is cut; openvino: by its chunks of 256 and blocks"},
    )
    block: int = field(default=32, metadata={"doc": "tokens of a block that openvino skips or reads"})

    def __post_init__(self) -> None:
        for key, least in (("sink", 0), ("window", 1), ("tail", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise UserError(f"trishape: {key}={value!r} is no number of tokens; give {least} or more")
        if self.mode not in MODES:
            raise UserError(f"trishape: mode={self.mode!r} is unknown; choose {' or '.join(MODES)}")
        if self.block < 8 or (BLOCK % self.block and self.block % BLOCK):
            raise UserError(f"trishape: block={self.block} doesn't fit the cache; give 16, 32, 64 or a multiple of 64")
        if self.mode == "openvino" and (self.sink % self.block or self.window % self.block):
            raise UserError(f"trishape: openvino counts in blocks; give sink and window as multiples of {self.block}")


class TriShape(Planner):
    """The attention part: the same for all heads."""

    name = "trishape"
    seam = "attention"
    prompt_only = True
    Config = TriShapeConfig
    identity: ClassVar = {"window": 1 << 20}
    trial: ClassVar = {"sink": 4, "window": 40, "tail": 20}
    capability = Capability(exact=False, prefix_stable=False, chunk_invariant=True)

    def __init__(self, config: TriShapeConfig) -> None:
        self.config = config
        if config.mode == "openvino":
            self.capability = replace(self.capability, chunk_invariant=False, chunk=CHUNK)
        elif not config.tail:
            self.capability = replace(self.capability, prefix_stable=True)

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        return self._by_row(ctx) if self.config.mode == "strict" else self._by_chunk(ctx)

    def _by_row(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) where the prompt is no longer than what each row reads, whatever the chunk."""
        c = self.config
        if ctx.prompt_len <= max(c.sink + c.window, c.tail):
            return None
        first, last = int(ctx.tok[0]) // Q_TILE, int(ctx.tok[-1]) // Q_TILE
        end = torch.arange(first + 1, last + 2) * Q_TILE
        is_tail = (end > ctx.prompt_len - c.tail) & (c.tail > 0)
        return AttnPlan(
            q_tile=Q_TILE,
            blk=BLOCK,
            head_map=torch.zeros(ctx.q.shape[1], dtype=torch.int16),
            tile_base=torch.tensor([0, len(end)], dtype=torch.int32),
            tile_first=torch.tensor([first], dtype=torch.int32),
            tile_map=is_tail.to(torch.int32),
            band=torch.tensor([[c.sink, c.window], [0, DENSE]], dtype=torch.int32),
        )

    def _by_chunk(self, ctx: PlanContext) -> AttnPlan | None:
        """Of the whole blocks before the chunk, those between the sink's and the window's are skipped."""
        c = self.config
        left = ctx.prompt_len - int(ctx.tok[-1]) - 1
        if ctx.place is None or left < c.tail:
            return None
        first = c.sink // c.block
        end = int(ctx.place[0]) // c.block - c.window // c.block
        if end <= first:
            return None
        grid = Grid(ctx, Q_TILE, c.block)
        block = torch.arange(grid.num_blocks)
        read = (block < first) | (block >= end)
        heads = torch.zeros(ctx.q.shape[1], dtype=torch.int16)
        return grid.plan(blocks=read.expand(1, grid.tiles, -1), head_map=heads)
