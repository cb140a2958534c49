"""Which entries score best: the arithmetic that row policies and retentions share, after a probe's sums are there.

Scores are float32 and ties go to the lower index, so that every schedule chooses the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d


def best(score: Tensor, count: int | Tensor) -> Tensor:
    """bool [.., n]: exactly `count` of the last axis, the highest scores of f32 [.., n]; i64 [..]: of each row its own.

    A count below 0 is 0, above n it is n.
    """
    n = score.shape[-1]
    if isinstance(count, int):
        if count <= 0 or count >= n:
            return torch.full(score.shape, count > 0)
        least = torch.from_numpy(np.partition(score.numpy(), n - count, axis=-1)[..., n - count, None])
    else:
        count = count[..., None]
        ranked = torch.from_numpy(np.sort(score.numpy(), axis=-1))
        least = ranked.gather(-1, (n - count).clamp(0, n - 1))
    above, level = score > least, score == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def before_window(colsum: Tensor, window: int, kernel: int) -> Tensor:
    """f32 [H, n - window]: each key's mass, averaged with its neighbours, of f32 [H, n]; the last keys are left out.

    SnapKV's score (arXiv 2404.14469, section 4): an average over `kernel` places, zeros past the ends.
    """
    return avg_pool1d(colsum[None, :, : colsum.shape[1] - window], kernel, stride=1, padding=kernel // 2)[0]
