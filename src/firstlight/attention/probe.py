"""What the last rows of a pass look at: softmax over the view, from which planners guess what the others will.

The one routine of all planners that probe (MInference, arXiv 2407.02490, section 3.2; FlexPrefill, arXiv 2502.20766,
section 3). It costs as much as dense attention does for these rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.core.attn import PlanContext


def probed(ctx: PlanContext, last_n: int, heads: Tensor | None = None) -> Iterator[Tensor]:
    """For each KV head f32 [g, m, n_kv]: attention of the last m = min(last_n, n) rows, model windows left aside.

    Of its query heads those in bool `heads` [Hq] alone, which may be none; by default all.
    """
    assert ctx.place is not None
    place = ctx.place[-last_n:]
    q, keys = (ctx.q[-last_n:].float() * ctx.scale).transpose(0, 1), ctx.keys()
    wanted = (torch.ones(len(q), dtype=torch.bool) if heads is None else heads).view(len(keys), -1)
    first = int(place[0]) + 1  # all of these rows see what lies before
    ahead = torch.arange(first, keys.shape[1]) > place[:, None]
    for rows, some, k in zip(q.chunk(len(keys)), wanted, keys):  # one KV head at a time: scores of all would be large
        scores = rows[some] @ k.float().T
        scores[..., first:].masked_fill_(ahead, -torch.inf)
        yield scores.softmax(-1)


def probe(ctx: PlanContext, last_n: int) -> Tensor:
    """f32 [Hq, m, n_kv]: the same of all heads."""
    return torch.cat(list(probed(ctx, last_n)))


def probe_operations(ctx: PlanContext, last_n: int) -> float:
    """Of `probe`."""
    rows, heads, dim = ctx.q.shape
    entries = int(ctx.tok[-1]) + 1 if ctx.place is None else int(ctx.place[-1]) + 1
    return 2.0 * min(last_n, rows) * heads * dim * entries


def by_distance(seen: Tensor, place: Tensor) -> Tensor:
    """f32 [Hq, n_kv]: of `probe`'s rows the mass at each distance place - entry, summed over rows."""
    own = place.tolist()
    sums = torch.zeros(seen.shape[0], own[-1] + 1)  # of the last row in its order; of others, moved to end with it
    for row, at in zip(seen.unbind(1), own):
        sums[:, own[-1] - at :] += row[:, : at + 1]
    return pad(sums.flip(1), (0, seen.shape[2] - sums.shape[1]))
