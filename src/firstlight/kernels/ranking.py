"""Which entries score best: the arithmetic that row policies and retentions share, after a probe's sums are there.

Scores are float32 and ties go to the lower index, so that every schedule chooses the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d


def best(score: Tensor, count: int) -> Tensor:
    """bool [.., n]: exactly `count` (0 to n) of the last axis, the highest scores of f32 [.., n]."""
    if count <= 0 or count >= score.shape[-1]:
        return torch.full(score.shape, count > 0)
    least = score.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = score > least, score == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def before_window(colsum: Tensor, window: int, kernel: int) -> Tensor:
    """f32 [H, n - window]: each key's mass, averaged with its neighbours, of f32 [H, n]; the last keys are left out.

    SnapKV's score (arXiv 2404.14469, section 4): an average over `kernel` places, zeros past the ends.
    """
    return avg_pool1d(colsum[None, :, : colsum.shape[1] - window], kernel, stride=1, padding=kernel // 2)[0]
