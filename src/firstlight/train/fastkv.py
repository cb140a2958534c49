"""Calibrates `fastkv`: finds the layer behind which the tokens that matter hardly change any more.

On some long prompts, in every layer that reads all tokens, the set of those with most attention from the prompt's end
is compared with the next such layer's. FastKV (arXiv 2502.01068, section 3) observes that these sets differ in early
layers and settle about halfway; rows should be dropped where that begins. In the first layers neighbours may agree on
the prompt's two ends, which is no sign that they know what matters: there no cut is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.kernels.ranking import before_window, best
from firstlight.llm import LLM
from firstlight.models.calibration import layers_of
from firstlight.models.decoder import Decoder
from firstlight.train.calibrating import Found, Notebook
from firstlight.train.texts import NAME, calibration_text, pieces

WINDOW, KERNEL = 8, 7
"""As the method's defaults."""


@dataclass(frozen=True)
class Config:
    """Raises UserError on values that can't be."""

    prompts: int = field(default=3, metadata={"doc": "prompts that are looked at"})
    length: int = field(default=2048, metadata={"doc": "tokens of each"})
    share: float = field(default=0.2, metadata={"doc": "share of the tokens that make up a set"})
    earliest: float = field(default=0.33, metadata={"doc": "share of the depth that a cut may not lie in"})
    slack: float = field(default=0.15, metadata={"doc": "how far below the later mean an overlap is still flat"})

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.length < 64 or not 0 < self.share < 1:
            raise UserError("fastkv: give 1 prompt or more, of 64 tokens or more, and a share in (0, 1)")
        if not 0 <= self.earliest < 1 or not 0 <= self.slack < 1:
            raise UserError("fastkv: earliest and slack are shares; give at least 0, less than 1")


def calibrate(llm: LLM, config: Config, notebook: Notebook) -> Found:
    """`tsp_idx`, and the curve it was read from: overlap of each layer's set with the next one's, in [0, 1]."""
    prompts = pieces(llm.encode(calibration_text()), config.prompts, config.length)
    layers = llm.config.facts("").full_layers
    if len(layers) < 2:
        raise UserError("fastkv needs a choice of layers that read all tokens; this model has none")
    done = notebook.read().get("overlaps", torch.zeros(0, len(layers) - 1))
    for n in range(len(done), len(prompts)):
        notebook.tell("comparing layers", n, len(prompts))
        done = torch.cat([done, overlaps(llm.engine.machine.model, prompts[n], layers, config.share)[None]])
        notebook.write({"overlaps": done})
    notebook.tell("comparing layers", len(prompts), len(prompts))
    curve = [round(overlap, 4) for overlap in done.mean(0).tolist()]
    first = sum(layer < config.earliest * llm.config.num_layers for layer in layers[:-2])
    values = {"tsp_idx": layers[settles(curve, config.slack, first)], "layers": layers, "overlap": curve}
    return Found(values, {NAME: calibration_text()})


@torch.inference_mode()
def overlaps(model: Decoder, ids: Sequence[int], layers: Sequence[int], share: float) -> Tensor:
    """f32 [len(layers) - 1]: the share of each layer's set that is in the next one's too."""
    sets = [
        best(_scores(q[-WINDOW:], k, model.scale), int(share * len(ids)))
        for layer, (q, k, _) in enumerate(layers_of(model, torch.tensor(ids)))
        if layer in layers
    ]
    return torch.stack([(a & b).sum() / a.sum() for a, b in pairwise(sets)])


def settles(curve: Sequence[float], slack: float, first: int) -> int:
    """The first place, from `first` on, after which no overlap is more than `slack` below the mean of those there."""
    for start in range(first, len(curve)):
        rest = curve[start:]
        if min(rest) >= sum(rest) / len(rest) - slack:
            return start
    raise AssertionError("the last overlap alone is flat")


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """f32 [n - w]: attention of the last rows q [w, Hq, d] on keys k [n, Hkv, d], as the method ranks tokens."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("whd,nhd->hwn", q.float(), k.float().repeat_interleave(group, 1)) * scale
    n = len(k)
    ahead = torch.arange(n) > torch.arange(n - len(q), n)[:, None]
    mass = scores.masked_fill(ahead, float("-inf")).softmax(-1).sum(1)
    return before_window(mass.view(k.shape[1], group, n).sum(1), len(q), KERNEL).sum(0)
