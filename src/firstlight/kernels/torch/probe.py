"""Probe sums: softmax mass on each key from some rows, by a second sweep over K with the rows' final log-sum-exp.

Sums run row by row in ordinal, then head order onto the running sum, so that strips and one pass give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.kernels.contract import SPLIT
from firstlight.kernels.torch.gather import Tile, entries
from firstlight.kernels.torch.ops import capped, linear
from firstlight.kernels.torch.visibility import visible_mask


def add_probe_sums(tile: Tile, lse: Tensor) -> None:
    """Add the attention of those rows of the tile that are probe rows; lse f32 [n, Hq] of all of them."""
    probe = tile.call.probe
    assert probe is not None
    colsum = probe.colsum[tile.b]
    skip = int((tile.tok < probe.first_tok[tile.b]).sum())
    if colsum is None or skip == tile.hi - tile.lo:
        return
    chosen = Tile(tile.call, tile.b, tile.lo + skip, tile.hi, tile.start, tile.size)
    for a in range(0, colsum.shape[1], SPLIT):
        _add_split(chosen, lse[skip:], colsum, a)


def _add_split(rows: Tile, lse: Tensor, colsum: Tensor, a: int) -> None:
    see = visible_mask(rows, a, a + SPLIT)
    seen = see.flatten(1, 2).any(1)
    if not seen.any():
        return
    hkv, n = colsum.shape[0], rows.hi - rows.lo
    k, _ = entries(rows, a, a + SPLIT, seen)
    q = rows.call.q[rows.lo : rows.hi].float().view(n, hkv, -1, rows.call.q.shape[2])
    group = q.shape[2]
    for h in range(hkv):
        scores = linear(q[:, h].reshape(n * group, -1), k[h].float().contiguous()).view(n, group, SPLIT)
        scores.mul_(rows.call.scale)
        if rows.call.score_cap is not None:
            scores = capped(scores, rows.call.score_cap)
        mass = torch.exp(scores - lse[:, h * group : (h + 1) * group, None])
        mass.masked_fill_(~see[h if see.shape[0] > 1 else 0], 0)
        part = colsum[h, a : a + SPLIT]
        for row in mass.view(n * group, SPLIT)[:, : part.shape[0]]:
            part += row
