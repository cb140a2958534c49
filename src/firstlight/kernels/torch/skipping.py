"""Which entries a tile's rows don't skip, by a sweep over K before the one that attends."""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.kernels.contract import SPLIT
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.skipping import highest, kept
from firstlight.kernels.torch.gather import Tile, entries
from firstlight.kernels.torch.ops import capped, linear
from firstlight.kernels.torch.visibility import visible_mask


def kept_entries(tile: Tile, q: Tensor) -> Tensor:
    """bool [Hkv, n, G, splits * SPLIT], given the tile's packed rows q [Hkv, 1, size * G, D]."""
    plan = tile.call.plan
    assert plan is not None
    best = torch.cat([_highest(tile, q, a) for a in range(0, max(tile.view.length), SPLIT)], -1)
    group = best.shape[2]
    by_head = [kept(best[h], plan, tile.b, slice(h * group, (h + 1) * group)) for h in range(len(best))]
    return torch.stack(by_head).repeat_interleave(BLOCK, -1)


def _highest(tile: Tile, q: Tensor, a: int) -> Tensor:
    """f32 [Hkv, n, G, SPLIT / BLOCK]: the highest score that rows see in each block of split `a`."""
    see = visible_mask(tile, a, a + SPLIT)
    k, _ = entries(tile, a, a + SPLIT, see.flatten(1, 2).any(1))
    score = torch.stack([linear(x.float(), y.float().contiguous()) for x, y in zip(q.squeeze(1), k)]) * tile.call.scale
    score = score if tile.call.score_cap is None else capped(score, tile.call.score_cap)
    score = score.view(len(k), tile.size, -1, SPLIT)[:, tile.place]
    return highest(score.masked_fill(~see, -torch.inf))
