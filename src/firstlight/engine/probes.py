"""Probing in one layer of a pass: whose rows are summed, and where the sums go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.parts import Obs
from firstlight.engine.batch import Member
from firstlight.engine.live import LiveRequest
from firstlight.kernels.contract import ProbeRows

_NEVER = 1 << 62


class Probes:
    """Prompt sums grow strip by strip in the request; a decode pass has sums of its own."""

    def __init__(self, layer: int, observed: Sequence[Member]) -> None:
        self._layer = layer
        self._last_n = {m.live.rid: n for m in observed if (n := wanted_rows(m.live, layer))}
        self._sums: dict[str, Tensor] = {}

    def rows(self, members: Sequence[Member]) -> ProbeRows | None:
        """What the attention call is told; None if nobody asks."""
        if not self._last_n:
            return None
        for m in members:
            if m.live.rid in self._last_n:
                self._sums[m.live.rid] = self._begin(m)
        return ProbeRows([self._first(m) for m in members], [self._sums.get(m.live.rid) for m in members])

    def obs(self, member: Member) -> Obs | None:
        """Sums so far of a member's request."""
        colsum = self._sums.get(member.live.rid)
        return None if colsum is None else Obs(colsum, member.live.kv.ordinals(self._layer))

    def _first(self, m: Member) -> int:
        last_n = self._last_n.get(m.live.rid, 0)
        return (m.live.num_known if m.decode else m.live.num_prompt) - last_n if last_n else _NEVER

    def _begin(self, m: Member) -> Tensor:
        """f32 [Hkv, n] over the view as it is now, with what earlier strips have summed."""
        heads, n = m.live.kv.length.shape[1], int(m.live.kv.length[self._layer].max())
        if m.decode:
            return torch.zeros(heads, n)
        old = m.live.colsum.get(self._layer, torch.zeros(heads, 0))
        grown = torch.nn.functional.pad(old, (0, n - old.shape[1]))
        m.live.colsum[self._layer] = grown
        return grown


def wanted_rows(live: LiveRequest, layer: int) -> int:
    """How many last rows are probe rows in this layer; 0 = none. Raises UserError if two parts want other rows."""
    asked = [part.probe(layer) for part in (*live.policies, live.retention) if part is not None]
    counts = {live.num_prompt if p.last_n == "all" else p.last_n for p in asked if p is not None}
    if len(counts) > 1:
        raise UserError(f"two methods probe different rows ({sorted(counts)}) in layer {layer}; give one of them")
    return counts.pop() if counts else 0
