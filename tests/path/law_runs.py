"""How law tests run an engine: requests through a policy, all logits caught."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firstlight.cache.digests import Digests
from firstlight.cache.pool import Pool
from firstlight.core.registry import Method, Part, make_schedule
from firstlight.core.request import Request, SamplingParams
from firstlight.core.schedule import Policy
from firstlight.core.view import ViewConfig
from firstlight.engine.admission import Limits
from firstlight.engine.engine import Engine
from firstlight.engine.machine import Machine
from firstlight.engine.park import ParkStore
from firstlight.engine.planning import Planning
from firstlight.evaluate.chaos import Chaos
from firstlight.kernels.kv_layout import Int8Layout, KVLayout
from firstlight.models.decoder import Decoder
from firstlight.reuse.prefix import PrefixCache

Logits = dict[str, dict[int, Tensor]]
"""Request -> ordinal -> logits of that row."""


@dataclass(frozen=True)
class Asked:
    """One request of an example."""

    rid: str
    ids: tuple[int, ...]
    new_tokens: int


class Watched(Engine):
    """An engine that keeps the logits it samples from."""

    seen: Logits

    def _sample(self, lives, work):  # type: ignore[no-untyped-def]
        for live in lives:
            self.seen[live.rid][live.num_known - 1] = work.logits[live.rid].clone()
        return super()._sample(lives, work)


def engine(model: Decoder, policy: Policy | str, columns: int, parts: Sequence[Part], cached: bool) -> Watched:
    config = model.config
    per_column = config.num_layers * config.num_kv_heads
    layout = Int8Layout if model.precision == "int8" else KVLayout
    pool = Pool(columns * per_column, config.head_dim, model.dtype, layout)
    view = ViewConfig(config.num_layers, per_column, pool.total, 8, 2048)
    made = Watched(
        Machine(model, model.ops, ParkStore(), Planning(Digests(pool, ()))),
        pool,
        make_schedule(Method.parse(policy), view) if isinstance(policy, str) else policy,
        view,
        Limits(8192, deterministic=True, windows=model.windows),
        parts,
        PrefixCache(pool, 64, b"law", model.windows) if cached else None,
    )
    made.seen = {}
    return made


def run(made: Watched, asked: list[Asked], chaos: int | None = None, later: bool = False) -> Logits:
    """All rows' logits of all requests, with stops and thread counts at random under `chaos`.

    All come at the beginning, or all but the first `later`, inside units too.
    """
    rng = random.Random(chaos)
    coming = [_request(made, one, rng if later else None) for one in asked]

    def at_a_stop(*_: object) -> None:
        if chaos is not None and rng.random() < 0.03:
            made.nudge()
        if coming and rng.random() < 0.05:
            made.add(coming.pop())

    made.on_stop = at_a_stop
    while coming and (not later or not made.has_work):
        made.add(coming.pop(0))
    while made.has_work or coming:
        if chaos is not None:
            torch.set_num_threads(rng.choice([1, 2]))
        if not made.has_work:
            made.add(coming.pop())
        made.step()
        made.pool.check()
    assert made.pool.used == 0 and made.pool.reserved == 0 and made.machine.park.nbytes == 0
    return made.seen


def _request(made: Watched, one: Asked, rng: random.Random | None) -> Request:
    """With a place for its logits; more or less urgent if there are dice."""
    made.seen[one.rid] = {}

    def sink(tok: Tensor, logits: Tensor) -> None:
        made.seen[one.rid] |= dict(zip(tok.tolist(), logits.clone()))

    sampling = SamplingParams(max_tokens=one.new_tokens, ignore_eos=True)
    slo = rng.choice([None, 1e-3, 0.02, 1.0]) if rng else None
    return Request(one.rid, one.ids, sampling, logits_at="all", logits_sink=sink, ttft_slo_s=slo)


def one_shot(model: Decoder, asked: list[Asked], parts: Sequence[Part] = ()) -> Logits:
    """Each request alone, its prompt in one segment."""
    seen: Logits = {}
    for one in asked:
        seen |= run(engine(model, "sarathi", 64, parts, cached=False), [one])
    return seen


def chaotic(
    model: Decoder, asked: list[Asked], seed: int, parts: Sequence[Part] = (), cached: bool = False
) -> tuple[Logits, Chaos]:
    """All requests together, under a random legal schedule."""
    policy = Chaos(seed, model.config.num_layers)
    columns = max(2 * (len(a.ids) + a.new_tokens) // 64 + 4 for a in asked)
    return run(engine(model, policy, columns, parts, cached), asked, chaos=seed), policy


def scheduled(model: Decoder, asked: list[Asked], schedule: str, seed: int, parts: Sequence[Part] = ()) -> Logits:
    """Requests that come one after the other, under one of the schedules."""
    columns = 2 * sum(len(a.ids) + a.new_tokens for a in asked) // 64 + 4
    return run(engine(model, schedule, columns, parts, cached=False), asked, chaos=seed, later=True)


def differences(got: Logits, want: Logits) -> list[tuple[str, int, float]]:
    """Rows that are not bit for bit the same: (request, ordinal, largest difference)."""
    return [
        (rid, tok, float((got[rid][tok] - logits).abs().max()))
        for rid, rows in want.items()
        for tok, logits in rows.items()
        if tok not in got[rid] or not torch.equal(got[rid][tok], logits)
    ]


def only_sampled(logits: Logits, asked: list[Asked]) -> Logits:
    """Rows that every schedule computes, also under a prefix cache: the last prompt row and generated ones."""
    return {a.rid: {t: row for t, row in logits[a.rid].items() if t >= len(a.ids) - 1} for a in asked}


__all__ = ["Asked", "chaotic", "differences", "engine", "one_shot", "only_sampled", "replace", "run", "scheduled"]
