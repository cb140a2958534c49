"""Asking a request's planner in one layer of a pass: what it may look at, and what becomes of its answer.

Layers with a window of the model's own aren't planned. Rows whose attention a part has asked for stay dense, and so
does a layer in which a plan would not pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from firstlight.attention.growing import dense_rows
from firstlight.cache.digests import Digests
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.engine.batch import Member
from firstlight.engine.costs import Costs
from firstlight.engine.live import LiveRequest
from firstlight.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Planning:
    """What all requests' planners share."""

    digests: Digests
    costs: Costs | None = None
    """None = plans are always used."""

    def plan(self, model: Decoder, layer: int, m: Member, q: Tensor, probed: int | None) -> AttnPlan | None:
        """The plan of a member's rows, of which those with ordinal `probed` or later are summed; None = dense."""
        planner = m.planner
        if planner is None or not len(m.tok) or model.windows[layer] is not None:
            return None
        ctx = self._context(model, layer, m, q)
        operations = planner.operations(ctx) if self.costs else 0.0
        dear = self.costs and operations and operations * self.costs.operation >= self.costs.densely(ctx)
        plan = planner.fallback(ctx) if dear else planner.plan(ctx)
        if not dear and plan is not None and self.costs and operations:
            dear = self.costs.of(plan, ctx) >= self.costs.densely(ctx)
            plan = planner.fallback(ctx) if dear else plan
        m.live.unplanned += bool(dear) and not m.decode
        m.live.planned += not dear and plan is not None
        return plan if plan is None or probed is None else dense_rows(plan, probed)

    def _context(self, model: Decoder, layer: int, m: Member, q: Tensor) -> PlanContext:
        live, view = m.live, m.live.kv.view(layer)
        return PlanContext(
            layer=layer,
            q=q[m.lo : m.hi],
            tok=m.tok,
            pos=m.pos,
            num_kv_heads=model.config.num_kv_heads,
            prompt_len=live.num_prompt,
            is_last_chunk=m.final,
            keys=lambda: live.kv.pool.layout.read_keys(view.table)[:, : max(view.length)],
            state=live.planner_state,
            place=_place(live, layer, m.tok),
            scale=model.scale,
            digest=lambda name: self.digests.read(name, view.table, max(view.length)),
            entries=partial(live.kv.entries, layer),
            product=lambda head, rows, out: live.kv.pool.layout.product(rows, view.table[head], out),
        )


def _place(live: LiveRequest, layer: int, tok: Tensor) -> Tensor | None:
    """Each row's own entry, where all heads hold the same ones."""
    if live.kv.is_identity_row(layer):
        return tok
    if not live.kv.is_common(layer):
        return None
    return torch.searchsorted(live.kv.ordinals(layer)[0], tok)
