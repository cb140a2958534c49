"""Planned attention for engines that keep K/V in tensors of their own: what every integration shares.

The planners are those of `--method`, asked as the engine asks them: after rotation, one request and one layer at a
time, in segments as long as a method's capability says. The cost guard stays out: it weighs our kernel against our own
dense attention, not against that of another engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlight.attention.joined import joined
from firstlight.cache.digests import digest_of
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.core.registry import Method, Part, make_parts
from firstlight.kernels.contract import AttnCall, AttnRows, AttnStats, KVView
from firstlight.kernels.dispatch import fastest
from firstlight.kernels.kv_layout import KVLayout
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve

DTYPES = (torch.bfloat16, torch.float32)
"""What the kernels compute in."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A pass of one request through one layer: q [T, Hq, D] of ordinals `first`.., k and v [first + T, Hkv, D]."""

    layer: int
    first: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class PlannedAttention:
    """Attention under the planners of some methods. Raises UserError on methods that no planner has."""

    def __init__(self, methods: Sequence[Method], model: str | Path | None = None) -> None:
        """`model`: the files that the weights come from, for methods that read a calibration."""
        self.methods = list(methods)
        self.stats = AttnStats()
        parts = _planners(make_parts(self.methods))
        for method in self.methods:
            mine = [part for part in parts if part.method == method.name]
            if not mine:
                raise UserError(f"{method.name} has no attention part; give one that has (firstlight methods list)")
            if model is None and any(part.capability.calibration for part in mine):
                raise UserError(f"{method.name} reads a calibration of the model; say model=PATH, so that it is found")
        self._digest = "" if model is None else open_checkpoint(resolve(str(model))).digest
        self.planner: Planner | None = joined([part.impl for part in parts])
        self._chunk = min((part.capability.chunk for part in parts if part.capability.chunk), default=None)

    def bind(self, shape: ModelFacts) -> None:
        """Make the planners anew for a model of this shape; its digest is that of the files told before."""
        facts = ModelFacts(**{name: getattr(shape, name) for name in shape.__slots__} | {"digest": self._digest})
        self.planner = joined([part.impl for part in _planners(make_parts(self.methods, facts))])

    def attend(self, rows: Rows, state: dict[str, Any]) -> Tensor | None:
        """[T, Hq, D]; None where the planners want nothing but dense. `state`: the request's scratch."""
        assert self.planner is not None
        num, step = len(rows.q), self._chunk or len(rows.q)
        ends = [*range(rows.first + step - rows.first % step, rows.first + num, step), rows.first + num]
        begins = [rows.first, *ends[:-1]]
        plans = [self.planner.plan(_context(rows, begin, end, state)) for begin, end in zip(begins, ends)]
        if all(plan is None for plan in plans):
            return None
        out = torch.empty_like(rows.q, memory_format=torch.contiguous_format)
        table, layout = KVLayout.holding(rows.k.contiguous(), rows.v.contiguous())
        for begin, end, plan in zip(begins, ends, plans):
            self._attend(rows, (begin, end), plan, KVView(table, [end] * len(table)), layout, out)
        return out

    def _attend(
        self, rows: Rows, part: tuple[int, int], plan: AttnPlan | None, view: KVView, layout: KVLayout, out: Tensor
    ) -> None:
        """Rows of ordinals [begin, end)."""
        begin, end = part
        where, tok = slice(begin - rows.first, end - rows.first), torch.arange(begin, end)
        call = AttnCall(
            q=rows.q[where],
            rows=AttnRows([0, end - begin], tok, tok, [False]),
            layout=layout,
            kv=[view],
            out=out[where],
            scale=rows.scale,
            plan=plan,
            stats=self.stats,
        )
        fastest(rows.q.shape[2]).attend(call, 0, end - begin)


def _planners(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part.seam == "attention"]


def _context(rows: Rows, begin: int, end: int, state: dict[str, Any]) -> PlanContext:
    """What a planner may look at: rows of ordinals [begin, end) of a prompt that ends with the pass."""
    tok = torch.arange(begin, end)
    k, v = (x[:end].transpose(0, 1) for x in (rows.k, rows.v))
    last = rows.first + len(rows.q)
    return PlanContext(
        layer=rows.layer,
        q=rows.q[begin - rows.first : end - rows.first],
        tok=tok,
        pos=tok,
        num_kv_heads=k.shape[0],
        prompt_len=last,
        is_last_chunk=end == last,
        keys=lambda: k,
        state=state,
        place=tok,
        scale=rows.scale,
        digest=lambda name: digest_of(name, k),
        entries=lambda: (k, v),
    )
