"""`flowprefill`: prompts go whole, and the most urgent one stops the one that runs, inside an operator if need be.

FlowPrefill (arXiv 2602.16603): how often a schedule decides, and how fast a prefill can be stopped, are two things that
chunks tie together. Here a prompt is one unit that stops within a slice when a more urgent request comes, keeps what it
has, and goes on later. The paper's worker only prefills; ours has running streams too, which get a step of their own
each `decode_every_ms`.

The order: first those that can still have their token in time, the earliest deadline first; then the late ones, the
latest deadline first, since these have lost least. A deadline is arrival + `ttft_slo_s`, or by default a second and
`slo_factor` times the predicted time of the prompt alone. In time is whom the clock leaves more than his unit still
takes, by a prediction fitted to the units so far (`schedule/pace.py`). A step of priority moves a deadline by
`ageing_s`.

What holds:

- Prompts: a more urgent request starts within a slice and a decode step, if its blocks are there. If they are not,
  or `max_parked` prefills stand half through, those that hold theirs drain first: nobody's work is thrown away for an
  arrival, and a pool that holds the largest prompt is enough.
- Short prompts share a unit of `batch_tokens`, as long as the first of them keeps a tenth of its time.
- Decodes: between two steps lie `decode_every_ms`, a slice more at most, or as long as the step itself took, so that
  prompts always get half of the time. At 0 they wait until no prompt is left.
- Liveness: once nobody comes any more the order settles, the first in it is never preempted, and all are served: late
  ones too. While more come than the machine can serve, late ones wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.schedule import Event, Plan, UnitDone, WorkUnit
from firstlight.core.view import RequestView, UnitView, View, ViewConfig
from firstlight.schedule.lane import OneLane, check_seconds, is_wanted
from firstlight.schedule.pace import Pace, Work, work_between, work_left, work_of

SLICE_S = 0.02
"""A unit told to wait works on for so long at most."""
LEAST_SLO_S = 1.0
"""What a request may wait that didn't say and takes no time itself."""
_SPARE = 0.1
"""Share of its `ttft_slo_s` that a request keeps when others join its unit."""

Choice = UnitView | RequestView
"""A prefill that may run next: one that stands half through, or a request with none."""


@dataclass(frozen=True)
class FlowPrefillConfig:
    """Raises UserError on values that no schedule can follow."""

    decode_every_ms: float = field(default=100.0, metadata={"doc": "running streams get a token so often; 0 is never"})
    slo_factor: float = field(
        default=4.0, metadata={"doc": "without ttft_slo_s: times its own prefill that a request may wait, and 1 s"}
    )
    batch_tokens: int = field(default=2048, metadata={"doc": "rows of short prompts that share a unit"})
    max_parked: int = field(default=4, metadata={"doc": "prefills that wait half through at once"})
    ageing_s: float = field(default=10.0, metadata={"doc": "seconds that one step of priority moves a deadline"})

    def __post_init__(self) -> None:
        for key, least in (("batch_tokens", 1), ("max_parked", 0)):
            if getattr(self, key) < least:
                raise UserError(f"flowprefill: {key}={getattr(self, key)} is too small; give {least} or more")
        check_seconds(
            "flowprefill", decode_every_ms=self.decode_every_ms, slo_factor=self.slo_factor, ageing_s=self.ageing_s
        )


class FlowPrefill(OneLane):
    """The schedule part of `flowprefill`; see the head of this file for what it guarantees.

    The memo: `pace`, what is known of speed; `ran`, seconds of units that were stopped; `until`, the end of a turn.
    """

    Config = FlowPrefillConfig

    def __init__(self, config: FlowPrefillConfig, view_config: ViewConfig) -> None:
        super().__init__(view_config, config.ageing_s)
        self.config = config
        self.batch_tokens = min(config.batch_tokens, view_config.max_num_batched_tokens)

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan:
        return super().step(now, events, replace(view, memo=self._learnt(events, view)))

    def _learnt(self, events: Sequence[Event], view: View) -> dict[str, Any]:
        """The memo with what the prefill that ended took, all its stretches together."""
        memo = {key: value for key, value in view.memo.items() if key != "ran"}
        for event in events:
            if isinstance(event, UnitDone) and (work := self._completed(event, view)):
                took = event.dur + view.memo.get("ran", {}).get(str(event.uid), 0.0)
                memo["pace"] = Pace.of(memo.get("pace")).after(work, took).sums
        ran = {str(uid): live.executed_s for uid, live in view.units.items() if live.executed_s}
        return memo | {"ran": ran} if ran else memo

    def _completed(self, event: UnitDone, view: View) -> Work | None:
        """What a prefill did; None for decodes, and where a cancelled request may have left early."""
        unit = view.last
        if unit is None or unit.uid != event.uid or unit.yield_at == "none":
            return None
        stayed = (rid in event.finished or rid in view.requests for rid in (s.rid for s in unit.segments))
        if not all(stayed) or any(s.kind == "decode" for s in unit.segments):
            return None
        return sum((work_of(s, self.num_layers) for s in unit.segments), Work())

    # --- who is first -------------------------------------------------------------------------------------------------

    def rank(self, request: RequestView, view: View) -> tuple[int, float]:
        """In time or late, and the deadline. Who has a token already is not late: it has nothing to lose any more."""
        aged, due = request.priority * self.ageing_s, self._due(request, view)
        live = next((u for u in view.units.values() if any(s.rid == request.rid for s in u.unit.segments)), None)
        if not request.n_generated and due - view.now <= self._seconds_left(live or request, view):
            return 1, aged - due
        return 0, aged + due

    def _due(self, request: RequestView, view: View) -> float:
        return request.arrival + self._slo(request, view)

    def _slo(self, request: RequestView, view: View) -> float:
        if request.ttft_slo_s is not None:
            return request.ttft_slo_s
        alone = work_between(max(request.n_cached, request.n_tokens - request.n_uncached), request.n_tokens)
        return LEAST_SLO_S + self.config.slo_factor * Pace.of(view.memo.get("pace")).seconds(alone)

    def _seconds_left(self, choice: Choice, view: View) -> float:
        """Until all of its prompts are through, if it ran from now on."""
        pace = Pace.of(view.memo.get("pace"))
        if isinstance(choice, RequestView):
            return pace.seconds(work_left(choice))
        members = (view.requests.get(s.rid) for s in choice.unit.segments)
        work = sum((work_left(r) for r in members if r is not None), Work())
        running = view.now - choice.started if choice.state == "running" else 0.0
        return max(0.0, pace.seconds(work) - choice.executed_s - running)

    def _first(self, view: View, ready: Sequence[RequestView]) -> tuple[tuple[int, float], Choice | None]:
        """The most urgent prefill that may run, and its rank; of equal ones that which has begun."""
        begun = self._begun(view)
        ranked: list[tuple[tuple[int, float], Choice]] = [(self._unit_rank(live, view), live) for live in begun]
        if len(begun) <= self.config.max_parked:
            ranked += [(self.rank(r, view), r) for r in ready if not r.is_decoding]
        return min(ranked, key=lambda pair: pair[0], default=((2, 0.0), None))

    def _begun(self, view: View) -> list[UnitView]:
        """Prefills under way that somebody waits for."""
        return [live for live in view.units.values() if live.unit.yield_at != "none" and is_wanted(live, view)]

    def _unit_rank(self, live: UnitView, view: View) -> tuple[int, float]:
        members = (view.requests[s.rid] for s in live.unit.segments)
        return min(self.rank(r, view) for r in members if r.state == "running")

    # --- what runs ----------------------------------------------------------------------------------------------------

    def admit(self, view: View) -> tuple[str, ...]:
        """The most urgent of all if it waits, and who shares its unit. Nobody else: blocks are kept for the urgent."""
        waiting = sorted((r for r in view.requests.values() if r.is_waiting), key=lambda r: self.rank(r, view))
        if not waiting or len(self._begun(view)) > self.config.max_parked:
            return ()
        if self._first(view, self.ready(view))[0] <= self.rank(waiting[0], view):
            return ()
        return self.fitting(view, self._batch(waiting, view))

    def beside(self, running: UnitView, view: View, ready: list[RequestView], admit: tuple[str, ...]) -> Plan:
        """A prefill gives way to a more urgent one, and to decodes when its turn is over."""
        memo = dict(view.memo)
        if running.unit.yield_at == "none":
            return Plan(admit=admit, memo=memo)
        until = memo.get("until", inf)
        if admit or until <= view.now or self._first(view, ready)[1] is not running:
            return Plan(admit=admit, yield_=(running.unit.uid,), memo=memo)
        return Plan(wake_at=until if until < inf else None, memo=memo)

    def next(self, view: View, ready: list[RequestView]) -> Plan:
        """Prompts until their turn is over, then a step of all decodes."""
        memo, decodes = dict(view.memo), self.decodes(ready)
        _, first = self._first(view, ready)
        until = self._turn(view) if decodes else inf
        memo.pop("until", None)
        if decodes and (first is None or until <= view.now):
            plan = self.submit(view, decodes, memo)
            if first is None or plan.submit or plan.preempt:
                return plan
        if until < inf:
            memo["until"] = until
        wake_at = until if view.now < until < inf else None
        if first is None:
            return Plan(memo=memo)
        if isinstance(first, UnitView):
            return Plan(resume=(first.unit.uid,), wake_at=wake_at, memo=memo)
        joined = self._batch([first, *(r for r in ready if r.rid != first.rid and r.is_prefilling)], view)
        segments = [segment for r in joined if (segment := self.chunk(r, r.n_known)[0]) is not None]
        return Plan(submit=(WorkUnit(view.next_uid, tuple(segments), "slice"),), wake_at=wake_at, memo=memo)

    def _turn(self, view: View) -> float:
        """Until when prompts have the lane while streams wait."""
        every = self.config.decode_every_ms / 1000
        if not every:
            return inf
        if view.last is None or view.last.yield_at != "none":
            return float(view.memo.get("until", view.now))
        return view.now + max(view.last_s, every - view.last_s - SLICE_S)

    def _batch(self, ranked: Sequence[RequestView], view: View) -> list[RequestView]:
        """The first of some requests, and others of them that fit its unit without making it late."""
        first = ranked[0]
        pace, work = Pace.of(view.memo.get("pace")), work_left(first)
        spare = self._due(first, view) - view.now - _SPARE * self._slo(first, view)
        if not first.is_prefilling or work.rows > self.batch_tokens or spare < 0:
            return [first]
        batch = [first]
        for request in ranked[1:]:
            more = work + work_left(request)
            if more.rows > self.batch_tokens:
                continue
            if pace.seconds(more) > spare:
                break
            batch.append(request)
            work = more
        return batch
