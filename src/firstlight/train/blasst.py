"""Calibrates `blasst`: which threshold has rows skip how many key blocks, for prompts and for generated tokens.

On prompts of several lengths each layer is looked at once. A block that is skipped never holds a row's highest
score, so what a row has seen so far doesn't depend on what was skipped: one dense pass counts for all thresholds
(BLASST, arXiv 2512.12087). Through the pairs of sparsity s and lambda * length goes scale = a exp(b s), fitted to their
logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from firstlight.attention.blasst import PHASES, SCANS
from firstlight.core.errors import UserError
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.skipping import gaps, highest
from firstlight.llm import LLM
from firstlight.models.calibration import layers_of
from firstlight.models.decoder import Decoder
from firstlight.train.calibrating import Found, Notebook
from firstlight.train.texts import NAME, calibration_text

THRESHOLDS = (
    *(m * 10.0**e for e in (-6, -5, -4, -3) for m in (1, 5)),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
)
AT_ONCE = 128
"""Rows that are counted at a time."""
DECODED = 64
"""Last rows that stand for generated tokens."""
FEWEST = 10
"""Pairs that a fit needs."""
SPARSITY = 0.1, 0.9
"""Pairs beyond these count for nothing."""


@dataclass(frozen=True)
class Config:
    """Raises UserError on values that can't be."""

    prompts: int = field(default=2, metadata={"doc": "prompts of each length"})
    length: int = field(
        default=4096, metadata={"doc": "tokens of the longest; others have a half, a quarter, an eighth"}
    )

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.length < 8 * BLOCK:
            raise UserError(f"blasst: give 1 prompt or more, of {8 * BLOCK} tokens or more")


def calibrate(llm: LLM, config: Config, notebook: Notebook) -> Found:
    """`scans`: of each order and phase a, b, and how many pairs they were fitted to."""
    ids = llm.encode(calibration_text())
    if len(ids) < config.length:
        raise UserError(f"blasst: the text has {len(ids)} tokens; give a length of no more")
    lengths = [config.length // part for part in (8, 4, 2, 1)]
    runs = list(product(lengths, range(config.prompts)))
    done = notebook.read().get("counts", torch.zeros(0, len(SCANS), 2, len(THRESHOLDS) + 1, dtype=torch.float64))
    for n in range(len(done), len(runs)):
        notebook.tell("counting blocks", n, len(runs))
        length, start = runs[n][0], runs[n][1] * (len(ids) - runs[n][0]) // max(config.prompts - 1, 1)
        done = torch.cat([done, counts(llm.engine.machine.model, ids[start : start + length])[None]])
        notebook.write({"counts": done})
    notebook.tell("counting blocks", len(runs), len(runs))
    sums = done.view(len(lengths), config.prompts, *done.shape[1:]).sum(1)
    scans = {
        scan: {phase: fit(sums[:, s, p], lengths) for p, phase in enumerate(PHASES)} for s, scan in enumerate(SCANS)
    }
    return Found({"scans": scans, "block": BLOCK}, {NAME: calibration_text()})


def fit(counted: Tensor, lengths: Sequence[int]) -> dict[str, float]:
    """a, b of scale = a exp(b s), from counts f64 [lengths, thresholds + 1]: blocks skipped at each, and all."""
    sparsity = counted[:, :-1] / counted[:, -1:]
    scale = torch.tensor(lengths, dtype=torch.float64)[:, None] * torch.tensor(THRESHOLDS, dtype=torch.float64)
    usable = (sparsity >= SPARSITY[0]) & (sparsity <= SPARSITY[1])
    if int(usable.sum()) < FEWEST:
        raise UserError(
            f"blasst: only {int(usable.sum())} thresholds skip between 10 and 90 % of the blocks, {FEWEST} are needed; "
            "give longer prompts with length=..."
        )
    x, y = sparsity[usable], scale[usable].log()
    away = x - x.mean()
    b = float((away * y).sum() / away.square().sum())
    return {"a": math.exp(float(y.mean()) - b * float(x.mean())), "b": b, "pairs": int(usable.sum())}


@torch.inference_mode()
def counts(model: Decoder, ids: Sequence[int]) -> Tensor:
    """f64 [scans, phases, thresholds + 1] of one prompt, over the layers that read all tokens."""
    made = torch.zeros(len(SCANS), 2, len(THRESHOLDS) + 1, dtype=torch.float64)
    for layer, (q, k, _) in enumerate(layers_of(model, torch.tensor(ids))):
        if model.windows[layer] is None:
            made += layer_counts(q.float() * model.scale, k.float())
    return made


def layer_counts(q: Tensor, k: Tensor) -> Tensor:
    """f64 [scans, phases, thresholds + 1] of queries [n, Hq, d], scaled, and keys [n, Hkv, d]."""
    made = torch.zeros(len(SCANS), 2, len(THRESHOLDS) + 1, dtype=torch.float64)
    group, levels = q.shape[1] // k.shape[1], torch.tensor(THRESHOLDS).log()
    for head, first in product(range(k.shape[1]), range(0, len(q), AT_ONCE)):
        rows = q[first : first + AT_ONCE, head * group : (head + 1) * group]
        best = highest(scores(rows, k[:, head], first))
        decoded = slice(max(len(q) - DECODED - first, 0), None)
        for scan in range(len(SCANS)):
            gap = gaps(best, scan)
            for phase, some in enumerate((gap, gap[decoded])):
                seen = some[some > -torch.inf].sort().values
                made[scan, phase, :-1] += torch.searchsorted(seen, levels)
                made[scan, phase, -1] += len(seen)
    return made


def scores(rows: Tensor, k: Tensor, first: int) -> Tensor:
    """f32 [m, G, n'] of rows [m, G, d], the first of ordinal `first`, and keys [n, d] up to the last row's; -inf where
    they read none."""
    end = first + len(rows)
    ahead = torch.arange(end) > torch.arange(first, end)[:, None, None]
    return (rows @ k[:end].T).masked_fill_(ahead, -torch.inf)
