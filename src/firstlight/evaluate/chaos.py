"""A schedule that does whatever the law allows: for checks that no legal order of cells changes an answer.

It decides by the view's step and a seed, so that a run is the same every time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from firstlight.core.schedule import Event, Plan, PreemptHow, Segment, Timer, WorkUnit, YieldAt, legal
from firstlight.core.view import RequestView, View

_STOPS: tuple[YieldAt, ...] = ("slice", "op", "sublayer", "layer")
_HOW: tuple[PreemptHow, ...] = ("recompute", "recompute", "park")


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
        room = view.free_blocks - sum(r.grow for r in view.requests.values())
        admit = [r.rid for r in waiting if r.need_blocks <= max(room, 0)]
        if admit and rng.random() < 0.7:
            return Plan(admit=(rng.choice(admit),))
        busy = {s.rid for u in view.units.values() for s in u.unit.segments}
        free = [r for r in view.requests.values() if r.state == "running" and r.rid not in busy]
        rng.shuffle(free)  # a batch's order is nobody's business either
        if self.preempts and free and rng.random() < 0.12 and self.num_preempted < 6:
            self.num_preempted += 1
            return Plan(preempt=((rng.choice(free).rid, rng.choice(_HOW)),))
        if view.units and (not free or len(view.units) > 2 or rng.random() < 0.4):
            return Plan(resume=(rng.choice(sorted(view.units)),))
        chosen = [r for r in free if rng.random() < 0.7] or free[:1]
        segments = self._that_fit(view, [s for r in chosen if (s := self._segment(rng, r)) is not None])
        if segments:
            return Plan(submit=(WorkUnit(view.next_uid, segments, rng.choice(_STOPS)),))
        if view.units:
            return Plan(resume=(rng.choice(sorted(view.units)),))
        if admit:
            return Plan(admit=tuple(admit[:1]))
        last = [r.rid for r in view.requests.values() if r in free][-1:]  # never the first, so that every request ends
        return Plan(preempt=tuple((rid, "recompute") for rid in last))

    def _beside(self, rng: random.Random, events: Sequence[Event], view: View) -> Plan:
        running = next(uid for uid, u in view.units.items() if u.state == "running")
        if len(view.units) < 3 and any(isinstance(e, Timer) for e in events) and rng.random() < 0.6:
            self.num_yielded += 1
            return Plan(yield_=(running,))
        return Plan()

    @staticmethod
    def _that_fit(view: View, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Those whose next blocks are there: a prompt's were reserved at admission."""
        room, fit = view.free_blocks, []
        for segment in segments:
            grow = view.requests[segment.rid].grow if segment.kind == "decode" else 0
            if grow <= room:
                room -= grow
                fit.append(segment)
        return tuple(fit)

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
