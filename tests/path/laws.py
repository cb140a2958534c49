"""Material of the law tests: a policy that plans any legal schedule, and a row policy that does everything.

Both decide by hashes and by the view's dice, so that an example is the same every time it runs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from firstlight.core.parts import Capability, Cut, Enter, Obs, PartContext, Probe, RequestRows, RowPolicy
from firstlight.core.registry import Part
from firstlight.core.schedule import Event, Plan, Segment, Timer, WorkUnit, legal
from firstlight.core.view import RequestView, View


@dataclass
class Chaos:
    """A policy that submits random legal rectangles, preempts, yields at random and resumes in random order."""

    seed: int
    num_layers: int
    preempts: bool = True
    widest: int = 700
    num_preempted: int = 0
    num_yielded: int = 0

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan:
        rng = random.Random(f"{self.seed}:{view.step}")
        if any(u.state == "running" for u in view.units.values()):
            return self._beside(rng, events, view)
        waiting = [r for r in view.requests.values() if r.is_waiting]
        admit = [r.rid for r in waiting if r.need_blocks <= view.free_blocks]
        if admit and rng.random() < 0.7:
            return Plan(admit=(rng.choice(admit),))
        busy = {s.rid for u in view.units.values() for s in u.unit.segments}
        free = [r for r in view.requests.values() if r.state == "running" and r.rid not in busy]
        if self.preempts and free and rng.random() < 0.12 and self.num_preempted < 6:
            self.num_preempted += 1
            return Plan(preempt=((rng.choice(free).rid, rng.choice(["recompute", "recompute", "park"])),))
        if view.units and (not free or len(view.units) > 2 or rng.random() < 0.4):
            return Plan(resume=(rng.choice(sorted(view.units)),))
        chosen = [r for r in free if rng.random() < 0.7] or free[:1]
        segments = tuple(s for r in chosen if (s := self._segment(rng, r)) is not None)
        if segments:
            return Plan(submit=(WorkUnit(view.next_uid, segments, rng.choice(["slice", "op", "sublayer", "layer"])),))
        return Plan(admit=tuple(admit[:1]))

    def _beside(self, rng: random.Random, events: Sequence[Event], view: View) -> Plan:
        running = next(uid for uid, u in view.units.items() if u.state == "running")
        if len(view.units) < 3 and any(isinstance(e, Timer) for e in events) and rng.random() < 0.6:
            self.num_yielded += 1
            return Plan(yield_=(running,))
        return Plan()

    def _segment(self, rng: random.Random, r: RequestView) -> Segment | None:
        """A random legal rectangle of a request; generated tokens one by one."""
        if not r.is_prefilling:
            t = r.f[-1]
            return Segment(r.rid, "decode", (t, t + 1), (0, self.num_layers)) if t < r.n_known else None
        starts = [0, *(layer for layer in range(1, self.num_layers) if r.f[layer - 1] > r.f[layer])]
        rng.shuffle(starts)
        for l0 in starts:
            t0, top = r.f[l0], r.n_tokens if l0 == 0 else r.f[l0 - 1]
            ends = [top, min(top, t0 + rng.randint(1, self.widest)), min(top, t0 + rng.randint(1, 40))]
            heights = [self.num_layers, l0 + 1, rng.randint(l0 + 1, self.num_layers)]
            rng.shuffle(heights)
            for t1 in sorted(ends, key=lambda _: rng.random()):
                for l1 in heights:
                    segment = Segment(r.rid, "prefill", (t0, t1), (l0, l1))
                    if t1 > t0 and legal(r.f, segment, r.barriers, r.n_tokens):
                        return segment
        return None


class Everything(RowPolicy):
    """Drops rows at one layer, at a barrier cuts by probe sums and parks, revives some at once and some in decode."""

    def __init__(self, seed: int, num_layers: int) -> None:
        self.seed, self.drop_at = seed, seed % max(1, num_layers - 2)
        self.barrier = self.drop_at + 1 if num_layers > 2 else 0
        self.drops = num_layers > 2

    def _hash(self, tok: Tensor, salt: int) -> Tensor:
        """i64 [n] in [0, 100)."""
        return (tok * 2654435761 + (self.seed + salt) * 40503) % 1000003 % 100

    def barriers(self) -> tuple[int, ...]:
        return (self.barrier,)

    def probe(self, layer: int) -> Probe | None:
        return Probe(8) if layer == self.barrier else None

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        if not self.drops or layer != self.drop_at or ctx.decode:
            return None
        return Cut(keep=rows.tok[self._hash(rows.tok, 1) < 80])

    def at_barrier(self, layer: int, tok: Tensor, obs: Obs | None, ctx: PartContext) -> Cut:
        assert obs is not None
        score = torch.zeros(int(tok[-1]) + 1)
        score[obs.tok[0]] = obs.colsum.sum(0)
        best = torch.argsort(score[tok], descending=True, stable=True)[: len(tok) // 2 + 1]
        return Cut(keep=tok[best].sort().values, park=True)

    def before_layer(self, layer: int, rows: RequestRows, parked: Tensor, ctx: PartContext) -> Enter | None:
        if layer != self.barrier + 1 or not len(rows.tok) or not len(parked):
            return None
        if ctx.decode:
            return Enter(revive=parked[self._hash(parked, 7 + int(rows.tok[-1])) < 5])
        upto = parked if ctx.final else parked[parked < rows.tok[-1]]
        return Enter(revive=upto[self._hash(upto, 3) < 20])

    def part(self) -> Part:
        return Part("everything", "tokens", self, None, Capability(alters_cells=False, prefix_stable=False))
