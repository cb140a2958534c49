"""`duoattention`: streaming heads read the first and the last tokens, the others everything (arXiv 2410.10819).

Which KV heads stream was found beforehand (`train/duoattention.py`); here nothing is scored, so a plan costs nothing.
In mode `strict` a row reads `sink` tokens and its own last `recent`, wherever chunks end. Mode `reference` is as
published: rows of a chunk read the whole chunk before them and the `recent` tokens before it, so what they see depends
on where it begins, and a first chunk is dense. Generated tokens are read alike in both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from firstlight.core.attn import DENSE, AttnPlan, PlanContext, Planner
from firstlight.core.calibration import Calibration
from firstlight.core.parts import Capability, ModelFacts
from firstlight.core.streaming import StreamingConfig, read_table, streaming_heads
from firstlight.kernels.kv_layout import BLOCK

Q_TILE = 128
"""Rows of a plan tile: a multiple of every kernel's own tile."""
_ALL, _STREAM = 0, 1
"""The two lists of a plan."""


class DuoAttention(Planner):
    """The attention part: two lists, one slot."""

    name = "duoattention"
    seam = "attention"
    Config = StreamingConfig
    by_place = True
    identity: ClassVar = {"streaming_ratio": 0.0}
    trial: ClassVar = {"sink": 4, "recent": 24}
    read_published = staticmethod(read_table)

    def __init__(self, config: StreamingConfig) -> None:
        self.config = config
        strict = config.mode == "strict"
        self.capability = Capability(
            exact=False, prefix_stable=strict, chunk_invariant=strict, chunk=1024, some_heads=True, calibration=True
        )
        self._maps: list[Tensor | None] = []
        """Of each layer the list of each query head, i16 [Hq]; None = no head streams."""

    capability = Capability(exact=False, chunk=1024, some_heads=True, calibration=True)

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        group = model.num_heads // model.num_kv_heads
        heads = streaming_heads(self.config, model, calibration)
        rows = torch.tensor(heads).repeat_interleave(group, 1).to(torch.int16) * _STREAM
        self._maps = [row if any(of_layer) else None for row, of_layer in zip(rows, heads)]

    @staticmethod
    def sample(model: ModelFacts) -> dict[str, Any]:
        """Gates for a check on a model that has none."""
        return {
            "gates": [[(7 * i + 3 * h) % 5 / 4 for h in range(model.num_kv_heads)] for i in range(model.num_layers)]
        }

    def heads(self, layer: int) -> Tensor | None:
        """bool [Hq]: the streaming heads."""
        heads = self._maps[layer]
        return None if heads is None else heads == _STREAM

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """Bands for streaming heads; None (dense) where none streams, or where sink and window hold the whole prompt.

        The prompt decides that, not the chunk: so a row is dense or banded wherever a chunk happens to end.
        """
        heads = self._maps[ctx.layer]
        if heads is None:
            return None
        begin, last = int(ctx.tok[0]), int(ctx.tok[-1])
        rows, shared = ctx.state.get(self.name, (None, None))
        if rows != (begin, last):  # what all layers share is made once a pass
            shared = self._shared(begin, last, ctx)
            ctx.state[self.name] = (begin, last), shared
        return None if shared is None else AttnPlan(q_tile=Q_TILE, blk=BLOCK, head_map=heads, **shared)

    def _shared(self, begin: int, last: int, ctx: PlanContext) -> dict[str, Tensor] | None:
        """A plan for ordinals [begin, last], but for who follows which list."""
        sink, recent = self.config.sink, self.config.recent
        if max(int(ctx.pos[-1]) + 1, ctx.prompt_len) <= sink + recent:
            return None
        first, tiles = begin // Q_TILE, last // Q_TILE - begin // Q_TILE + 1
        opened = self.config.mode == "reference" and begin < ctx.prompt_len
        return {
            "tile_base": torch.tensor([0, tiles], dtype=torch.int32),
            "tile_first": torch.tensor([first], dtype=torch.int32),
            "tile_map": torch.zeros(tiles, dtype=torch.int32),
            "band": torch.tensor([[0, DENSE], [sink, recent]], dtype=torch.int32),
            **(_opened(max(begin - recent, 0), last) if opened else {}),
        }


def _opened(begin: int, last: int) -> dict[str, Tensor]:
    """Lists that open entries [begin, last] to streaming heads: blocks, and the columns before the first whole one."""
    whole = -(-begin // BLOCK)
    lists = {"blk": (whole, last // BLOCK + 1), "col": (begin, min(whole * BLOCK, last + 1))}
    made: dict[str, Tensor] = {}
    for name, (a, e) in lists.items():
        made[f"{name}_ptr"] = torch.tensor([0, 0, max(e - a, 0)], dtype=torch.int32)
        made[f"{name}_idx"] = torch.arange(a, e, dtype=torch.int32)
    return made
