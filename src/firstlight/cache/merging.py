"""Folding K/V entries into others: what `Merge` means (LOOK-M, arXiv 2406.18139, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

_PIVOT, _WEIGHTED = "pivot", "weighted"


def merge_entries(k: Tensor, v: Tensor, assign: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [n, D] of one KV head, assign i64 [n] -> (kept entry numbers i64 [m], their new k, v [m, D]).

    With E_j the entries that go into j: k_j <- (k_j + sum over E_j of u_i) / (|E_j| + 1), where u_i is k_i (mean), the
    middle of k_i and k_j (pivot), or k_i times the cosine of the two keys (weighted); v by the same weights. Sums are
    float32, in ascending order.
    """
    own = torch.arange(len(assign))
    kept = own[assign == own]
    assert bool((assign[assign] == assign).all()), "an entry goes into one that stays"
    gone = own[assign != own]
    target = assign[gone]
    share = torch.ones(len(gone), 1)
    if mode == _WEIGHTED:
        share = torch.cosine_similarity(k[gone].float(), k[target].float(), dim=-1)[:, None]
    count = torch.bincount(target, minlength=len(assign)).float()[:, None] + 1
    merged = [_folded(x.float(), gone, target, share, count, mode)[kept].to(x.dtype) for x in (k, v)]
    return kept, merged[0], merged[1]


def _folded(x: Tensor, gone: Tensor, target: Tensor, share: Tensor, count: Tensor, mode: str) -> Tensor:
    """x f32 [n, D] with the `gone` entries added to their targets, as means."""
    moved = (x[gone] + x[target]) / 2 if mode == _PIVOT else x[gone] * share
    return x.index_add(0, target, moved) / count
