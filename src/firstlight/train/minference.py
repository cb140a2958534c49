"""The table of MInference: which pattern each head follows, all at one cost (arXiv 2407.02490, section 3.2).

In every layer that reads all tokens each candidate's numbers are scaled, head by head, until it reads as many keys as
the A-shape does, whole blocks and single columns as the kernel takes them. Of candidates that cost the same a head gets
the one whose output is nearest to dense. The prompt is a recall task, as published: passkeys in a book. The published
numbers, of a prompt of 30,000 tokens, are taken as shares: on shorter ones they would read everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from firstlight.attention.grid import pairs
from firstlight.attention.minference import MInference, MInferenceConfig
from firstlight.attention.patterns import BAND, BLOCKS, KINDS, LINES, Pattern
from firstlight.cache.digests import digest_of
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.core.errors import UserError
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK, KVLayout
from firstlight.llm import LLM
from firstlight.models.calibration import layers_of
from firstlight.models.decoder import Decoder
from firstlight.train.calibrating import Found, Notebook
from firstlight.train.passkeys import Passkeys
from firstlight.train.texts import NAME, calibration_text

_N = 30_000
"""Tokens of the prompt that the published numbers are for."""
CANDIDATES = (
    Pattern(LINES, 30 / _N, 2048 / _N),
    Pattern(LINES, 100 / _N, 1800 / _N),
    Pattern(LINES, 500 / _N, 1500 / _N),
    Pattern(LINES, 3000 / _N, 200 / _N),
    Pattern(BLOCKS, 100 * BLOCK / _N),
)
"""Table 7 of the paper; the A-shape, whose numbers say what they all may cost, is in `Config`."""
_STEPS = 10
"""Halvings of the interval in which a scale is looked for."""
_LARGEST = 8.0
"""The end of that interval."""


@dataclass(frozen=True)
class Config:
    """Raises UserError on values that no search can have."""

    prompts: int = field(default=1, metadata={"doc": "prompts that are looked at"})
    length: int = field(default=4096, metadata={"doc": "tokens of each"})
    sink: float = field(default=1024 / _N, metadata={"doc": "share of the tokens that the A-shape reads at the start"})
    window: float = field(default=4096 / _N, metadata={"doc": "share that it reads at the end: what all may cost"})
    seed: int = field(default=0, metadata={"doc": "of the prompts"})

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.length < 10 * BLOCK:
            raise UserError(f"minference: give 1 prompt or more, of {10 * BLOCK} tokens or more")
        if not (self.sink >= 0 and self.window > 0 and self.sink + self.window < 1):
            raise UserError("minference: sink and window are shares; give less than 1 together, and some window")

    @property
    def candidates(self) -> Sequence[Pattern]:
        return (Pattern(BAND, self.sink, self.window), *CANDIDATES)


def calibrate(llm: LLM, config: Config, notebook: Notebook) -> Found:
    """`table`: for each layer {head: [kind, first, second, error]}; and how many heads have each kind."""
    layers, text = llm.config.facts("").full_layers, calibration_text()
    if not layers:
        raise UserError("minference needs a layer that reads all tokens; every layer of this model has a window")
    passkeys = Passkeys(llm.tokenizer, text, count=10, words=8, seed=config.seed)
    prompts = [passkeys.draw(number, config.length).ids for number in range(config.prompts)]
    found = search(llm.engine.machine.model, prompts, layers, config.candidates, notebook).mean(0)
    table: list[dict[str, list[Any]]] = [{} for _ in range(llm.config.num_layers)]
    for layer, of_layer in zip(layers, found):
        table[layer] = winners(config.candidates, of_layer)
    return Found({"table": table, **_summary(table)}, {NAME: text})


@torch.inference_mode()
def search(
    model: Decoder, prompts: Sequence[Tensor], layers: Sequence[int], candidates: Sequence[Pattern], notebook: Notebook
) -> Tensor:
    """f64 [prompts, layers, C, Hq, 3] of prompts i64 [N]: what `Layer.found` says."""
    total = len(prompts) * len(layers)
    done = notebook.read().get("found", torch.zeros(0, len(candidates), model.config.num_heads, 3).double())
    captured = (qkv for ids in prompts for layer, qkv in enumerate(layers_of(model, ids)) if layer in layers)
    for n, (q, k, v) in enumerate(islice(captured, len(done), None), len(done)):
        notebook.tell("searching patterns", n, total)
        done = torch.cat([done, Layer(model, q, k, v).found(candidates)[None]])
        notebook.write({"found": done})
    notebook.tell("searching patterns", total, total)
    return done.view(len(prompts), len(layers), *done.shape[1:])


def winners(candidates: Sequence[Pattern], found: Tensor) -> dict[str, list[Any]]:
    """{head: [kind, first, second, error]}: each head's nearest of f64 [C, Hq, 3]."""
    row = {}
    for head, winner in enumerate(found[:, :, 2].argmin(0).tolist()):
        first, second, error = (round(x, 5) for x in found[winner, head].tolist())
        row[str(head)] = [candidates[winner].kind, first, second, error]
    return row


def _summary(table: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, int]:
    """How many heads have which pattern."""
    kinds = [entry[0] for row in table for entry in row.values()]
    return {kind: kinds.count(kind) for kind in KINDS}


class Layer:
    """One layer of one prompt: q [N, Hq, d], k and v [N, Hkv, d]."""

    def __init__(self, model: Decoder, q: Tensor, k: Tensor, v: Tensor) -> None:
        q, (n, heads, _) = q.contiguous(), k.shape
        (table, layout), tok = KVLayout.holding(k.contiguous(), v), torch.arange(n)
        rows, view, cap = AttnRows([0, n], tok, tok, [False]), KVView(table, [n] * heads), model.config.score_cap
        self._attend = model.ops.attend
        self._call = AttnCall(q, rows, layout, [view], torch.empty_like(q), model.scale, score_cap=cap)
        keys = k.transpose(0, 1)
        means = digest_of("mean_k", keys)
        self._ctx = PlanContext(0, q, tok, tok, heads, n, True, lambda: keys, {}, tok, model.scale, lambda name: means)
        self._dense = self._out(None)

    def found(self, candidates: Sequence[Pattern]) -> Tensor:
        """f64 [C, Hq, 3]: each candidate's two numbers at the cost of the first one, and how far its output then is."""
        heads = self._call.q.shape[1]
        most = self.cost([candidates[0]] * heads)
        return torch.stack([self._tried(self._scaled(candidate, most)) for candidate in candidates])

    def cost(self, patterns: Sequence[Pattern]) -> Tensor:
        """f64 [Hq]: (row, key) pairs that the kernel takes for each head under these patterns."""
        plan, tok = self._plan(patterns), self._ctx.tok
        if plan is None:
            return torch.full((len(patterns),), float((tok + 1).sum()), dtype=torch.float64)
        blocks, columns, rows = pairs(plan, tok)
        return rows @ (blocks + columns)

    def _scaled(self, candidate: Pattern, most: Tensor) -> list[Pattern]:
        """For each head the candidate as large as it may be at a cost of f64 [Hq]; the first one as it is."""
        if candidate.kind == BAND:
            return [candidate] * len(most)
        low, high = torch.zeros(len(most)), torch.full((len(most),), _LARGEST)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            fits = self.cost([times(candidate, s) for s in middle.tolist()]) <= most
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return [times(candidate, s) for s in low.tolist()]

    def _tried(self, patterns: Sequence[Pattern]) -> Tensor:
        """f64 [Hq, 3]: the numbers of each head's pattern, and its output's distance to dense, as a share of that."""
        off = (self._out(self._plan(patterns)) - self._dense).square().sum((0, 2))
        error = (off / self._dense.square().sum((0, 2))).sqrt()
        numbers = torch.tensor([[p.first, p.second] for p in patterns], dtype=torch.float64)
        return torch.cat([numbers, error[:, None].double()], 1)

    def _plan(self, patterns: Sequence[Pattern]) -> AttnPlan | None:
        planner = MInference(MInferenceConfig())
        planner.patterns = [list(patterns)]
        return planner.plan(self._ctx)

    def _out(self, plan: AttnPlan | None) -> Tensor:
        """f32 [N, Hq, d]."""
        call = replace(self._call, plan=plan)
        self._attend(call, 0, len(call.q))
        return call.out.to(torch.float32, copy=True)


def times(pattern: Pattern, scale: float) -> Pattern:
    """So many times as much, shares remaining shares."""
    return Pattern(pattern.kind, min(scale * pattern.first, 1.0), min(scale * pattern.second, 1.0))
