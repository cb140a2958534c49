"""Calibrates `xattention`: finds for each head the tau with which its blocks hold a given share of attention mass.

Scores of antidiagonals are no attention mass (arXiv 2503.16428, section 2.3, finds thresholds for each head too): the
same tau holds nearly all of one head's and half of another's. On some long prompts the scores and the dense mass of
every block are taken down; then tau is bisected, for all heads at once, until what is read holds `recall` of the mass.
Rows of blocks that read everything anyway don't count, so that the length of the prompts doesn't either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.attention.grid import Grid
from firstlight.attention.oracle import attention_mass
from firstlight.attention.xattention import XAttentionConfig, block_mass, cover
from firstlight.core.attn import PlanContext
from firstlight.core.errors import UserError
from firstlight.llm import LLM
from firstlight.models.calibration import layers_of
from firstlight.models.decoder import Decoder
from firstlight.train.calibrating import Found, Notebook
from firstlight.train.texts import NAME, calibration_text, pieces

_STEPS, _DIGITS = 14, 4


@dataclass(frozen=True)
class Config:
    """Raises UserError on values that can't be."""

    recall: float = field(default=0.95, metadata={"doc": "share of the attention mass that each head shall read"})
    stride: int = field(default=8, metadata={"doc": "as the method's"})
    block: int = field(default=128, metadata={"doc": "as the method's"})
    prompts: int = field(default=4, metadata={"doc": "prompts that are looked at"})
    length: int = field(default=4096, metadata={"doc": "tokens of each"})

    def __post_init__(self) -> None:
        XAttentionConfig(stride=self.stride, block=self.block)
        if not 0 < self.recall < 1:
            raise UserError(f"xattention: recall={self.recall} is no share that can be missed; give 0.5 to 0.99")
        if self.prompts < 1 or self.length < 4 * self.block:
            raise UserError(f"xattention: give 1 prompt or more, of {4 * self.block} tokens or more")


def calibrate(llm: LLM, config: Config, notebook: Notebook) -> Found:
    """`tau` [layers][Hq], 1 in layers with a window; `density`: the share of blocks that is read so."""
    facts = llm.config.facts("")
    layers = facts.full_layers
    if not layers:
        raise UserError("xattention needs a layer that reads all tokens; every layer of this model has a window")
    prompts = pieces(llm.encode(calibration_text()), config.prompts, config.length)
    done = notebook.read()
    for n in range(len(done.get("mass", ())), len(prompts)):
        notebook.tell("comparing scores with attention", n, len(prompts))
        made = observe(llm.engine.machine.model, prompts[n], layers, config)
        done = {key: torch.cat([done[key], new]) if done else new for key, new in made.items()}
        notebook.write(done)
    notebook.tell("comparing scores with attention", len(prompts), len(prompts))
    scores, mass = (done[key].permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1, 2) for key in ("scores", "mass"))
    tau, density = shares(scores, mass, config.prompts, config.recall)
    table = torch.ones(facts.num_layers, facts.num_heads)
    table[layers] = tau.view(len(layers), -1)
    rounded = [[round(share, _DIGITS) for share in row] for row in table.tolist()]
    values = {"stride": config.stride, "block": config.block, "density": round(density, _DIGITS), "tau": rounded}
    return Found(values, {NAME: calibration_text()})


@torch.inference_mode()
def observe(model: Decoder, ids: Sequence[int], layers: Sequence[int], config: Config) -> dict[str, Tensor]:
    """`scores` and `mass` f32 [1, layers, Hq, tiles, nb] of a prompt: of the method, and of dense attention."""
    seen = [
        of_blocks(q, k, model.scale, config)
        for layer, (q, k, _) in enumerate(layers_of(model, torch.tensor(ids)))
        if layer in layers
    ]
    return {key: torch.stack([part[n] for part in seen])[None] for n, key in enumerate(("scores", "mass"))}


def shares(scores: Tensor, mass: Tensor, prompts: int, recall: float) -> tuple[Tensor, float]:
    """tau f32 [H] with which scores [H, prompts tiles, nb] choose blocks that hold `recall` of mass; the density."""
    tiles, block = torch.arange(scores.shape[1] // prompts)[:, None], torch.arange(scores.shape[2])
    forced, causal = (m.repeat(prompts, 1) for m in ((block == 0) | (block == tiles), block <= tiles))
    choice = (causal & ~forced).any(1)
    scores, mass, forced, causal = scores[:, choice], mass[:, choice], forced[choice], causal[choice]
    low, high = torch.zeros(len(scores)), torch.ones(len(scores))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = (mass * cover(scores, forced, middle)).sum(-1).mean(-1) >= recall
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    tau = (high * 10**_DIGITS).ceil() / 10**_DIGITS
    read = cover(scores, forced, tau) & causal
    return tau, float(read.sum() / (causal.sum() * len(scores)))


def of_blocks(q: Tensor, k: Tensor, scale: float, config: Config) -> tuple[Tensor, Tensor]:
    """Scores and mean mass f32 [Hq, tiles, nb] of queries [n, Hq, d] on keys [n, Hkv, d]."""
    tok, keys, block = torch.arange(len(q)), k.transpose(0, 1), config.block
    ctx = PlanContext(0, q, tok, tok, len(keys), len(q), True, lambda: keys, {}, tok, scale)
    grid = Grid(ctx, block, block)
    mass = []
    for tile in range(math.ceil(len(q) / block)):
        share = attention_mass(ctx, slice(tile * block, (tile + 1) * block), "head").float().mean(1)
        share = pad(share, (0, grid.num_blocks * block - share.shape[1]))
        mass.append(share.view(len(share), -1, block).sum(2))
    return block_mass(ctx, grid, config.stride), torch.stack(mass, 1)
