"""Material of the law tests: a row policy that does everything.

It decides by hashes, so that an example is the same every time it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.core.parts import Capability, Cut, Enter, Obs, PartContext, Probe, RequestRows, RowPolicy
from firstlight.core.registry import Part


class Everything(RowPolicy):
    """Drops rows at one layer, at a barrier cuts by probe sums and parks, revives some at once and some in decode."""

    def __init__(self, seed: int, num_layers: int) -> None:
        self.seed, self.drop_at = seed, seed % max(1, num_layers - 2)
        self.barrier = self.drop_at + 1 if num_layers > 2 else 0
        self.drops = num_layers > 2

    def _hash(self, tok: Tensor, salt: int) -> Tensor:
        """i64 [n] in [0, 100)."""
        return (tok * 2654435761 + (self.seed + salt) * 40503) % 1000003 % 100

    def barriers(self) -> tuple[int, ...]:
        return (self.barrier,)

    def probe(self, layer: int) -> Probe | None:
        return Probe(8) if layer == self.barrier else None

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        if not self.drops or layer != self.drop_at or ctx.decode:
            return None
        return Cut(keep=rows.tok[self._hash(rows.tok, 1) < 80])

    def at_barrier(self, layer: int, tok: Tensor, obs: Obs | None, ctx: PartContext) -> Cut:
        assert obs is not None
        score = torch.zeros(int(tok[-1]) + 1)
        score[obs.tok[0]] = obs.colsum.sum(0)
        best = torch.argsort(score[tok], descending=True, stable=True)[: len(tok) // 2 + 1]
        return Cut(keep=tok[best].sort().values, park=True)

    def before_layer(self, layer: int, rows: RequestRows, parked: Tensor, ctx: PartContext) -> Enter | None:
        if layer != self.barrier + 1 or not len(rows.tok) or not len(parked):
            return None
        if ctx.decode:
            return Enter(revive=parked[self._hash(parked, 7 + int(rows.tok[-1])) < 5])
        upto = parked if ctx.final else parked[parked < rows.tok[-1]]
        return Enter(revive=upto[self._hash(upto, 3) < 20])

    def part(self) -> Part:
        return Part("everything", "tokens", self, None, Capability(alters_cells=False, prefix_stable=False))
