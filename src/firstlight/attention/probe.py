"""What the last rows of a pass look at: softmax over the view, from which planners guess what the others will.

The one routine of all planners that probe (MInference, arXiv 2407.02490, section 3.2; FlexPrefill, arXiv 2502.20766,
section 3). It costs as much as dense attention does for these rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from firstlight.core.attn import PlanContext

_STRIP = 32
"""Rows of a query head that are looked at together."""


def probed(ctx: PlanContext, last_n: int, heads: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """For each KV head f32 [g, entries] twice: what the last m = min(last_n, n) rows look at, model windows left aside,
    summed over them: the mass of each entry, and the mass at each distance, which is a row's own entry less another.

    Of its query heads those in bool `heads` [Hq] alone, which may be none; by default all.
    """
    assert ctx.place is not None
    q, place = (ctx.q[-last_n:].float() * ctx.scale).transpose(0, 1), ctx.place[-last_n:]
    wanted = (torch.ones(len(q), dtype=torch.bool) if heads is None else heads).view(ctx.num_kv_heads, -1)
    n = int(place[-1]) + 1
    room = torch.empty(wanted.shape[1] * min(len(place), _STRIP), n)  # fresh memory costs as much as what is done in it
    for head, (of_group, some) in enumerate(zip(q.chunk(len(wanted)), wanted)):
        rows = of_group[some]
        sums, apart = torch.zeros(2, len(rows), n)
        for begin in range(0, len(place), _STRIP) if len(rows) else ():
            own = place[begin : begin + _STRIP]
            strip = rows[:, begin : begin + _STRIP]
            seen = _attention(ctx, head, strip, own, room)
            sums += seen.sum(1)
            for row, at in zip(seen.unbind(1), own.tolist()):  # distances of the last row, in its order
                apart[:, n - 1 - at :] += row[:, : at + 1]
        yield sums, apart.flip(1)


def _attention(ctx: PlanContext, head: int, rows: Tensor, place: Tensor, room: Tensor) -> Tensor:
    """f32 [g, m, n] in room [g m or more, n]: softmax of rows [g, m, D], scaled, over the first n keys of a KV head."""
    scores = room[: rows.shape[0] * rows.shape[1]]
    ctx.by_keys(head, rows.flatten(0, 1), scores)
    scores, first = scores.view(*rows.shape[:2], room.shape[1]), int(place[0]) + 1  # up to there all of these rows see
    scores[..., first:].masked_fill_(torch.arange(first, scores.shape[2]) > place[:, None], -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def probe_operations(ctx: PlanContext, last_n: int) -> float:
    """Of `probed`."""
    rows, heads, dim = ctx.q.shape
    entries = int(ctx.tok[-1]) + 1 if ctx.place is None else int(ctx.place[-1]) + 1
    return 2.0 * min(last_n, rows) * heads * dim * entries
