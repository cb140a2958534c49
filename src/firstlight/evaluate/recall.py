"""Mass recall and output error of a planner, layer by layer and head by head, on one real prompt.

Q, K and V are taken once from a dense prefill. Then any planner is asked for its plans on them, as if the prompt were
its own, chunk by chunk if it wants chunks, and dense softmax says what the plan leaves out:

- recall: the share of a row's dense softmax mass that lies on the keys it reads, in the mean over rows. The first token
  may hold most of the mass without meaning anything (an attention sink, arXiv 2309.17453), so `rest` is the recall of
  all other keys' mass: what was read of it over what there is, both summed over rows;
- error: |o - o_dense| / |o_dense|, over all rows of a head.

No model runs, and each layer has the K and V of dense: this is a planner's own mistake, without what follows from it.
So knobs can be turned to a density in seconds a layer (the three gaps of arXiv 2606.07703 begin here). Everything is
computed in blocks of rows, in float32; which keys a plan shows is asked of the reference's definition.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from firstlight.attention.joined import joined
from firstlight.cache.digests import digest_of
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, PromptIds
from firstlight.core.registry import Part
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.engine import Engine
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.reference.attention import visible_mask

LAYERS = 6
"""Layers that are looked at unless somebody names them: so many of those without a window, spread evenly."""
ROWS = 128
"""Rows of a block."""
Passed = tuple[int, int, AttnPlan | None]
"""A pass over rows [lo, hi), and its plan."""
FIGURES = ("density", "recall", "rest", "error")


@dataclass(frozen=True)
class Captured:
    """What a dense prefill gave attention in some layers: for each the context of all rows, and k, v [Hkv, n, D]."""

    contexts: dict[int, PlanContext]
    entries: dict[int, tuple[Tensor, Tensor]]
    score_cap: float | None
    heads: int

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.contexts.values())).tok)

    def context(self, layer: int, lo: int, hi: int, state: dict[str, Any]) -> PlanContext:
        """As a planner sees rows [lo, hi) when they are a pass of their own."""
        whole, (k, v) = self.contexts[layer], self.entries[layer]
        return replace(
            whole,
            q=whole.q[lo:hi],
            tok=whole.tok[lo:hi],
            pos=whole.pos[lo:hi],
            place=whole.tok[lo:hi],
            is_last_chunk=hi == len(whole.tok),
            keys=lambda: k[:, :hi],
            entries=lambda: (k[:, :hi], v[:, :hi]),
            digest=lambda name: digest_of(name, k[:, :hi]),
            state=state,
        )


class _Capture(Planner):
    """Plans nothing, and keeps what it sees in some layers."""

    capability = Capability(exact=True)

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = layers
        self.seen: dict[int, list[PlanContext]] = {layer: [] for layer in layers}
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        if ctx.layer in self.seen and not ctx.is_decode:
            assert ctx.entries is not None
            k, v = ctx.entries()
            self.entries[ctx.layer] = k.clone(), v.clone()
            self.seen[ctx.layer].append(replace(ctx, q=ctx.q.clone(), tok=ctx.tok.clone(), pos=ctx.pos.clone()))
        return None


def layers_of(windows: Sequence[int | None], count: int = LAYERS) -> list[int]:
    """Layers that read all tokens, at most `count`, from the first to the last of them."""
    full = [layer for layer, window in enumerate(windows) if window is None]
    if not full:
        raise UserError("every layer of the model reads a window, so there is nothing to plan; choose other --tasks")
    count = min(count, len(full))
    return [full[i * (len(full) - 1) // max(count - 1, 1)] for i in range(count)]


def planners_of(parts: Sequence[Part]) -> list[Part]:
    """The parts of a setting that is judged here. Raises UserError on methods that aren't planners alone."""
    for part in parts:
        if part.seam != "attention":
            raise UserError(
                f"recall is measured on planners alone, and {part.method} does something else; choose other --tasks"
            )
    return list(parts)


def capture(engine: Engine, prompt: PromptIds, layers: Sequence[int]) -> Captured:
    """Prefill a prompt densely with an engine that has no methods."""
    assert not engine.parts, "Q, K and V of dense are wanted"
    keeper = _Capture(layers)
    live = engine.add(Request("capture", list(prompt.ids), SamplingParams(max_tokens=1, temperature=0.0)))
    live.planner = keeper
    while engine.is_live("capture"):
        engine.step()
    contexts = {layer: _joined(parts) for layer, parts in keeper.seen.items()}
    config = engine.machine.model.config
    return Captured(contexts, keeper.entries, config.score_cap, config.num_heads)


def measure(captured: Captured, parts: Sequence[Part]) -> dict[str, Any]:
    """The record of a planner: its figures in each captured layer, and each head's. No parts are dense."""
    planners = planners_of(parts)
    planner, chunk = joined([part.impl for part in planners]), _chunk_of(planners)
    state: dict[str, Any] = {}
    plans: dict[int, list[Passed]] = {layer: [] for layer in captured.contexts}
    began = time.perf_counter()
    for lo, hi in _chunks(captured, chunk):
        for layer, made in plans.items():
            made.append((lo, hi, planner.plan(captured.context(layer, lo, hi, state)) if planner else None))
    planner_s = time.perf_counter() - began
    layers = [{"layer": layer, **of_layer(captured, layer, made)} for layer, made in plans.items()]
    facts: dict[str, Any] = {"planner_s": planner_s, "ttft_s": None, "methods": []}
    size = {"prompt_tokens": captured.num_rows, "computed": 1.0}
    return {"layers": layers, **facts, **size, **_means(layers)}


def of_layer(captured: Captured, layer: int, plans: Sequence[Passed]) -> dict[str, Any]:
    """Figures of one layer under plans of passes over rows [lo, hi): each head's, and their means."""
    sums = _Sums(captured.heads)
    for lo, hi, plan in plans:
        for call, a, b in _blocks(captured, layer, lo, hi, plan):
            for head in range(len(call.kv[0].length)):
                _add(sums, captured, layer, head, call, a, b)
    heads = sums.figures()
    return {**{key: sum(head[key] for head in heads) / len(heads) for key in FIGURES}, "heads": heads}


@dataclass
class _Sums:
    """Running sums over rows, f64 [Hq] each."""

    num_heads: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    def add(self, heads: slice, **terms: Tensor) -> None:
        for key, value in terms.items():
            self.kept.setdefault(key, torch.zeros(self.num_heads, dtype=torch.float64))[heads] += value.double()

    def figures(self) -> list[dict[str, float]]:
        k = self.kept
        found = {
            "density": k["visible"] / k["pairs"],
            "recall": k["mass"] / k["rows"],
            "rest": torch.where(k["rest_all"] > 0, k["rest"] / k["rest_all"].clamp_min(1e-30), 1.0),
            "error": (k["apart"] / k["norm"].clamp_min(1e-30)).sqrt(),
        }
        return [{key: float(value[head]) for key, value in found.items()} for head in range(self.num_heads)]


def _add(sums: _Sums, captured: Captured, layer: int, head: int, call: AttnCall, a: int, b: int) -> None:
    """Rows [a, b) of the call and the query heads of one KV head."""
    k, v = (entries[head, : call.kv[0].length[head]].float() for entries in captured.entries[layer])
    seen = visible_mask(call, 0, head, a, b).transpose(0, 1)
    heads = slice(head * len(seen), (head + 1) * len(seen))
    scores = call.q[a:b, heads].float().transpose(0, 1) @ k.T * call.scale
    if captured.score_cap is not None:
        scores = captured.score_cap * torch.tanh(scores / captured.score_cap)
    ahead = torch.arange(len(k)) > call.rows.tok[a:b, None]
    mass = scores.masked_fill_(ahead, -torch.inf).softmax(-1)
    kept = mass * seen
    dense, share = mass @ v, kept.sum(-1)
    out = kept @ v / share.clamp_min(1e-30)[..., None]
    sums.add(
        heads,
        rows=torch.full((len(seen),), float(b - a)),
        visible=seen.sum((1, 2)),
        pairs=(~ahead).sum().expand(len(seen)),
        mass=share.sum(-1),
        rest=kept[..., 1:].sum((1, 2)),
        rest_all=mass[..., 1:].sum((1, 2)),
        apart=(out - dense).square().sum((1, 2)),
        norm=dense.square().sum((1, 2)),
    )


def _blocks(
    captured: Captured, layer: int, lo: int, hi: int, plan: AttnPlan | None
) -> Iterator[tuple[AttnCall, int, int]]:
    """The call of one pass, and its blocks of rows, each with no more of the view than its rows may read."""
    ctx, heads = captured.contexts[layer], captured.entries[layer][0].shape[0]
    rows = AttnRows([0, hi - lo], ctx.tok[lo:hi], ctx.pos[lo:hi], [False])
    for a in range(0, hi - lo, ROWS):
        b = min(a + ROWS, hi - lo)
        view = KVView(torch.zeros(heads, 0, dtype=torch.int32), [lo + b] * heads)
        nothing: Any = None
        yield AttnCall(ctx.q[lo:hi], rows, nothing, [view], nothing, ctx.scale, plan), a, b


def _chunks(captured: Captured, chunk: int | None) -> list[tuple[int, int]]:
    n = captured.num_rows
    return [(lo, min(lo + (chunk or n), n)) for lo in range(0, n, chunk or n)]


def _chunk_of(planners: Sequence[Part]) -> int | None:
    return min((part.capability.chunk for part in planners if part.capability.chunk), default=None)


def _joined(parts: Sequence[PlanContext]) -> PlanContext:
    """The passes of one prompt as one."""
    q, tok, pos = (torch.cat([getattr(part, key) for part in parts]) for key in ("q", "tok", "pos"))
    return replace(parts[-1], q=q, tok=tok, pos=pos)


def _means(layers: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(layer[key] for layer in layers) / len(layers) for key in FIGURES}
