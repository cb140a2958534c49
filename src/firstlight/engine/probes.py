"""Probing in one layer of a pass: whose rows are summed, and where the sums go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
        self._seen: dict[str, Obs] = {}

    def rows(self, members: Sequence[Member]) -> ProbeRows | None:
        """What the attention call is told; None if nobody asks."""
        if not self._last_n:
            return None
        for m in members:
            if m.live.rid in self._last_n:
                self._seen[m.live.rid] = self._begin(m)
        seen = [self._seen.get(m.live.rid) for m in members]
        return ProbeRows([self._first(m) for m in members], [None if obs is None else obs.colsum for obs in seen])

    def obs(self, member: Member) -> Obs | None:
        """Sums so far of a member's request."""
        return self._seen.get(member.live.rid)

    def _first(self, m: Member) -> int:
        last_n = self._last_n.get(m.live.rid, 0)
        return (m.segment.tok[1] if m.decode else m.live.num_prompt) - last_n if last_n else _NEVER

    def _begin(self, m: Member) -> Obs:
        """Sums over the view as it is now, beginning with what earlier strips have summed."""
        heads, n = m.live.kv.length.shape[1], int(m.live.kv.length[self._layer].max())
        # What is kept of the layer's K/V afterwards may be less: the ordinals belong to the sums.
        tok = m.live.kv.ordinals(self._layer)
        tok = tok if m.live.kv.is_identity_row(self._layer) else tok.clone()
        if m.decode:
            return Obs(torch.zeros(heads, n), tok)
        old = m.live.seen[self._layer].colsum if self._layer in m.live.seen else torch.zeros(heads, 0)
        m.live.seen[self._layer] = Obs(torch.nn.functional.pad(old, (0, n - old.shape[1])), tok)
        return m.live.seen[self._layer]


def wanted_rows(live: LiveRequest, layer: int) -> int:
    """How many last rows are probe rows in this layer; 0 = none. Raises UserError if two parts want other rows."""
    asked = [part.probe(layer) for part in (*live.policies, live.retention) if part is not None]
    counts = {live.num_prompt if p.last_n == "all" else p.last_n for p in asked if p is not None}
    if len(counts) > 1:
        raise UserError(f"two methods probe different rows ({sorted(counts)}) in layer {layer}; give one of them")
    return counts.pop() if counts else 0
