"""What planners are given, and what their plans show, for tests of planners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK, KVLayout
from firstlight.kernels.reference.attention import visible_mask


def context(
    q: Tensor, k: Tensor, rows: Sequence[int] | Tensor, prompt_len: int | None = None, **given: Any
) -> PlanContext:
    """Of one prompt with queries [N, Hq, D] and keys [N, Hkv, D] those rows that a pass has, everything before written.

    Without `place` in `given` nothing was dropped.
    """
    tok = torch.as_tensor(rows)
    place = given.pop("place", tok)
    keys = k[: int(tok[-1]) + 1].transpose(0, 1)
    return PlanContext(
        layer=given.pop("layer", 0),
        q=q[tok],
        tok=tok,
        pos=tok,
        num_kv_heads=k.shape[1],
        prompt_len=len(q) if prompt_len is None else prompt_len,
        is_last_chunk=int(tok[-1]) == len(q) - 1,
        keys=lambda: keys,
        state={},
        place=place,
        scale=q.shape[2] ** -0.5,
        **given,
    )


def seen(plan: AttnPlan | None, ctx: PlanContext, entries: Tensor | None = None) -> Tensor:
    """bool [n, Hq, entries]: what each row of the pass sees under a plan, by the definition in core/attn.py.

    `entries`: i64 [n_kv], the ordinals that are still there; None = all.
    """
    rows = AttnRows([0, len(ctx.tok)], ctx.tok, ctx.pos, [False])
    end, heads = int(ctx.tok[-1]) + 1 if entries is None else len(entries), ctx.num_kv_heads
    there = None if entries is None else entries.expand(heads, -1).contiguous()
    view = KVView(torch.zeros(heads, -(-end // BLOCK), dtype=torch.int32), [end] * heads, there, there)
    call = AttnCall(ctx.q, rows, KVLayout(1, ctx.q.shape[2], ctx.q.dtype), [view], ctx.q, ctx.scale, plan)
    return torch.cat([visible_mask(call, 0, h, 0, len(ctx.tok)) for h in range(heads)], 1)


def some_qk(num: int, heads: int = 6, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random queries [N, Hq, D] and keys [N, Hkv, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, heads, dim, generator=generator), torch.randn(num, kv_heads, dim, generator=generator)
