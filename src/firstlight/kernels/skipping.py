"""Which blocks a row skips: those whose scores lie far below what the row has met (BLASST, arXiv 2512.12087).

Each row votes for itself. It meets the view's blocks of 64 entries in the plan's order, and skips one where the highest
score that it sees there is below the highest of all blocks before by more than -`skip_log`. A skipped block never holds
a new highest score, so what is skipped doesn't depend on what was skipped before: one pass tells it for any threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.core.attn import AttnPlan
from firstlight.kernels.kv_layout import BLOCK


def highest(score: Tensor) -> Tensor:
    """score [.., n], -inf where a row doesn't see -> [.., nb]: the highest in each block."""
    full = pad(score, (0, -score.shape[-1] % BLOCK), value=-torch.inf)
    return full.view(*full.shape[:-1], -1, BLOCK).amax(-1)


def gaps(best: Tensor, scan: int) -> Tensor:
    """best [.., nb] -> [.., nb]: each block's highest score minus the highest that was met before it.

    inf for the first block, -inf where nothing is seen.
    """
    met = order(best.shape[-1], scan)
    before = pad(best[..., met].cummax(-1).values[..., :-1], (1, 0), value=-torch.inf)
    return torch.where(best == -torch.inf, best, best - before[..., met.argsort()])


def order(num_blocks: int, scan: int) -> Tensor:
    """i64 [nb]: blocks in the order of a plan's `scan`."""
    blocks = torch.arange(num_blocks)
    if scan == 0:
        return blocks
    return blocks.flip(0) if scan == 1 else torch.cat([blocks[:1], blocks[1:].flip(0)])


def kept(best: Tensor, plan: AttnPlan, b: int, heads: slice) -> Tensor:
    """bool [.., G, nb]: which blocks rows of these query heads of request b don't skip, given best [.., G, nb]."""
    assert plan.skip_log is not None
    seen = best > -torch.inf
    return seen & (gaps(best, plan.scan) >= plan.skip_log[b, heads, None])
