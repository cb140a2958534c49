"""What the last rows of a pass look at: softmax over the view, from which planners guess what the others will.

The one routine of all planners that probe (MInference, arXiv 2407.02490, section 3.2; FlexPrefill, arXiv 2502.20766,
section 3). It costs as much as dense attention does for these rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from firstlight.core.attn import PlanContext


def probed(ctx: PlanContext, last_n: int, heads: Tensor | None = None) -> Iterator[Tensor]:
    """For each KV head f32 [g, m, entries]: attention of the last m = min(last_n, n) rows, model windows left aside.

    Of its query heads those in bool `heads` [Hq] alone, which may be none; by default all.
    """
    assert ctx.place is not None
    place = ctx.place[-last_n:]
    q = (ctx.q[-last_n:].float() * ctx.scale).transpose(0, 1)
    wanted = (torch.ones(len(q), dtype=torch.bool) if heads is None else heads).view(ctx.num_kv_heads, -1)
    first, n = int(place[0]) + 1, int(place[-1]) + 1  # all of these rows see what lies before the first
    ahead = torch.arange(first, n) > place[:, None]
    for h, (rows, some) in enumerate(zip(q.chunk(len(wanted)), wanted)):  # scores of all would be large
        scores = ctx.by_keys(h, rows[some].flatten(0, 1), n).view(-1, len(place), n)
        scores[..., first:].masked_fill_(ahead, -torch.inf)
        yield torch.softmax(scores, -1, out=scores)


def probe(ctx: PlanContext, last_n: int) -> Tensor:
    """f32 [Hq, m, entries]: the same of all heads."""
    return torch.cat(list(probed(ctx, last_n)))


def probe_operations(ctx: PlanContext, last_n: int) -> float:
    """Of `probe`."""
    rows, heads, dim = ctx.q.shape
    entries = int(ctx.tok[-1]) + 1 if ctx.place is None else int(ctx.place[-1]) + 1
    return 2.0 * min(last_n, rows) * heads * dim * entries


def by_distance(seen: Tensor, place: Tensor) -> Tensor:
    """f32 [Hq, entries]: of `probe`'s rows the mass at each distance place - entry, summed over rows."""
    own = place.tolist()
    sums = torch.zeros(seen.shape[0], own[-1] + 1)  # of the last row in its order; of others, moved to end with it
    for row, at in zip(seen.unbind(1), own):
        sums[:, own[-1] - at :] += row[:, : at + 1]
    return sums.flip(1)
