"""Several planners as one: those that decide some heads first, one that may decide all others (README-attention).

A planner whose capability says `some_heads` tells by `heads(layer)` which query heads are its own. DuoAttention's
streaming heads read a band while its retrieval heads are left to a sparse planner (arXiv 2410.10819, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from firstlight.attention.transforms import by_head
from firstlight.core.attn import AttnPlan, PlanContext, Planner


@dataclass
class ByHead(Planner):
    """`scoped` decides its own heads, `rest` the others. Each has a scratch of its own."""

    scoped: Any
    rest: Planner

    def __post_init__(self) -> None:
        self.prompt_only = self.scoped.prompt_only and self.rest.prompt_only
        self.by_place = all(planner.by_place or planner.prompt_only for planner in (self.scoped, self.rest))

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        heads = self.scoped.heads(ctx.layer)
        own, other = (replace(ctx, state=ctx.state.setdefault(name, {})) for name in ("scoped", "rest"))
        plan = _asked(self.rest, other)
        return plan if heads is None else by_head(heads, _asked(self.scoped, own), plan)

    def fallback(self, ctx: PlanContext) -> AttnPlan | None:
        """Heads that are decided by themselves stay so: the K/V that they don't read may be gone."""
        heads, own = self.scoped.heads(ctx.layer), replace(ctx, state=ctx.state.setdefault("scoped", {}))
        return None if heads is None else by_head(heads, _asked(self.scoped, own), None)

    def operations(self, ctx: PlanContext) -> float:
        asked = (planner for planner in (self.scoped, self.rest) if not (planner.prompt_only and ctx.is_decode))
        return sum(float(planner.operations(ctx)) for planner in asked)

    def rehearse(self, ctx: PlanContext) -> float:
        return self.rest.rehearse(ctx)


def _asked(planner: Any, ctx: PlanContext) -> AttnPlan | None:
    """One of two may leave generated tokens dense that the other plans."""
    return None if planner.prompt_only and ctx.is_decode else planner.plan(ctx)


def joined(planners: Sequence[Any]) -> Planner | None:
    """One planner for a request; None for dense."""
    scoped = [p for p in planners if p.capability.some_heads]
    chosen: Planner | None = next((p for p in planners if not p.capability.some_heads), None)
    for planner in scoped:
        chosen = planner if chosen is None else ByHead(planner, chosen)
    return chosen
