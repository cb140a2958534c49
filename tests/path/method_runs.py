"""How tests look into a request under a method: its logits, its K/V and its parked rows after every token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from firstlight.core.request import Request, SamplingParams
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.evaluate.chaos import Chaos
from tests.tiny import VOCABULARY, tiny_engine

Ordinals = list[list[int]]
OTHER_SETTINGS = [
    "minference:exact=on",
    "flexprefill:slash_cover=both,tau=0.8",
    "xattention:alternating=on",
    "trishape:mode=openvino,sink=32,window=32,block=16,tail=0",
    "compactattention:union=off",
    "quoka:pool=64,budget=64",
    "oracle:heads=head",
    "oracle:k=32,rows=16,block=16,pool=max",
    "blasst:scan=desc",
    "blasst:scan=sink-then-desc,decode=off",
]
"""Of planners, for prompts of some hundred tokens: what their `trial` settings don't ask for."""


@dataclass
class Seen:
    """What one request showed: logits by ordinal, and after each token what was held."""

    logits: dict[int, Tensor] = field(default_factory=dict)
    kept: list[list[Ordinals]] = field(default_factory=list)
    """Token, layer, KV head -> ordinals with K/V."""
    parked: list[Ordinals] = field(default_factory=list)
    """Token, layer -> ordinals that can be revived into it."""
    ids: list[int] = field(default_factory=list)
    live: LiveRequest | None = None


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def method_engine(*methods: str, layers: int = 5, chaos: int | None = None, **options: Any) -> Engine:
    """A tiny engine, deterministic; with `chaos` any legal schedule runs, stops and preemptions included."""
    engine = tiny_engine(num_layers=layers, method=methods, deterministic=True, prefix_cache="off", **options)
    if chaos is not None:
        rng = random.Random(chaos)
        engine.policy = Chaos(chaos, layers)
        engine.on_stop = lambda work, stop: engine.nudge() if rng.random() < 0.03 else None
    return engine


def begin(engine: Engine, ids: Sequence[int], new: int, rid: str = "r") -> Seen:
    """Add a request; `Seen` fills as the engine steps."""
    seen = Seen()

    def sink(tok: Tensor, logits: Tensor) -> None:
        seen.logits |= dict(zip(tok.tolist(), logits.clone()))

    def choose(generated: Sequence[int], logits: Tensor) -> int:
        seen.logits[len(ids) + len(generated) - 1] = logits.clone()
        seen.kept.append(kept(engine, rid))
        parked = (engine.machine.park.ordinals(rid, layer, "cut") for layer in range(engine.config.num_layers))
        seen.parked.append([tok.tolist() for tok in parked])
        return int(logits.argmax())

    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    request = Request(rid, list(ids), sampling, logits_at="all", logits_sink=sink, choose=choose)
    seen.live = engine.add(request)
    return seen


def kept(engine: Engine, rid: str) -> list[Ordinals]:
    kv = engine._lives[rid].kv
    heads = range(kv.length.shape[1])
    return [[kv.ordinals(layer)[h, : kv.length[layer, h]].tolist() for h in heads] for layer in range(len(kv.length))]


def finish(engine: Engine, *seen: Seen) -> None:
    """Run to the end, after which nothing may be left."""
    while engine.has_work:
        engine.step()
        engine.pool.check()
    assert engine.pool.used == 0 and engine.pool.reserved == 0 and engine.machine.park.nbytes == 0
    for one in seen:
        assert one.live is not None
        one.ids = one.live.ids


def run(engine: Engine, ids: Sequence[int], new: int = 4) -> Seen:
    seen = begin(engine, ids, new)
    finish(engine, seen)
    return seen


def same_bits(a: Seen, b: Seen, exactly: bool = True) -> bool:
    """Whether two runs computed the same rows, with the same bits, and hold the same; or the first at least those."""
    rows = all(tok in a.logits and torch.equal(a.logits[tok], row) for tok, row in b.logits.items())
    return rows and (not exactly or (a.kept == b.kept and a.parked == b.parked and len(a.logits) == len(b.logits)))
