"""The engine's protocol on a virtual clock: the same events and plans, durations from a cost model, no tensors.

`run` is the loop (events, view, plan, effects). `SimExecutor` stands in for the machine: it keeps the block account,
checks every segment against the staircase law, and tells a policy nothing but events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from firstlight.core import schedule as told
from firstlight.core.errors import UserError
from firstlight.core.schedule import CostModel, Event, Plan, Policy, PreemptHow, Segment, WorkUnit, legal
from firstlight.core.view import View, ViewConfig
from firstlight.engine.eventlog import EventLog


@dataclass
class SimRequest:
    """A request to simulate: what a trace says of it, and the time stamps (seconds) of what happened to it."""

    rid: str
    at: float
    n_tokens: int
    n_output: int
    n_hit: int = 0
    cancel_at: float = inf
    whole_prompt: bool = False
    chunk: int | None = None
    barriers: tuple[int, ...] = ()
    priority: int = 0
    ttft_slo_s: float | None = None
    admitted_at: list[float] = field(default_factory=list)
    token_at: list[float] = field(default_factory=list)
    ended_at: float | None = None

    @property
    def n_known(self) -> int:
        return self.n_tokens + len(self.token_at)

    def arrival(self, need_blocks: int) -> told.Arrival:
        return told.Arrival(
            self.rid,
            self.n_tokens,
            n_uncached=self.n_tokens - self.n_hit,
            need_blocks=need_blocks,
            max_tokens=self.n_output,
            whole_prompt=self.whole_prompt,
            chunk=self.chunk,
            barriers=self.barriers,
            priority=self.priority,
            ttft_slo_s=self.ttft_slo_s,
        )


@dataclass(frozen=True)
class RowCost:
    """The simplest cost model: seconds a unit, a cell (one row in one layer), and a pair of cell and key."""

    unit_s: float = 2e-3
    cell_s: float = 1e-5
    pair_s: float = 1e-9

    def unit(self, unit: WorkUnit, view: View) -> float:
        return self.unit_s + sum(self._segment(segment) for segment in unit.segments)

    def _segment(self, segment: Segment) -> float:
        (t0, t1), (l0, l1) = segment.tok, segment.layer
        return (t1 - t0) * (l1 - l0) * (self.cell_s + self.pair_s * (t0 + t1) / 2)


@dataclass
class _Held:
    """What an admitted request holds: columns reserved, cells done."""

    columns: int
    f: list[int]
    parked: bool = False


@dataclass
class _Live:
    """A submitted unit. `left` = seconds of work that remain, counted from `since` once it runs."""

    unit: WorkUnit
    segments: list[Segment]
    left: float
    since: float = 0.0
    state: str = "queued"


def run(policy: Policy, executor: SimExecutor, log: EventLog | None = None) -> View:
    """Runs until nothing more can happen; the last view. Raises RuntimeError if a policy leaves requests behind."""
    view = View.start(executor.config)
    while events := executor.wait():
        view = view.after(executor.now, events)
        plan = policy.step(executor.now, events, view)
        if log is not None:
            log.step(executor.now, events, plan)
        executor.apply(plan, view)
        view = view.after_plan(plan)
    left = [r.rid for r in executor.requests.values() if r.ended_at is None]
    if left:
        raise RuntimeError(f"the policy stopped with {len(left)} requests left: {left[:4]}")
    return view


class SimExecutor:
    """One lane and one pool. A plan takes effect at once; facts come back as the events of the next `wait`.

    Units run in order of submission. While one runs, the clock stops only at its slice points, `slice_s` apart.
    Raises UserError if a request can never fit the pool, ValueError if a plan breaks the rules.
    """

    def __init__(
        self, config: ViewConfig, cost: CostModel, requests: Sequence[SimRequest], slice_s: float = 0.02
    ) -> None:
        self.config, self.cost, self.slice_s = config, cost, slice_s
        self.now, self.timer, self.free = 0.0, inf, config.total_blocks
        self.requests = {request.rid: request for request in requests}
        self._held: dict[str, _Held] = {}
        self._live: dict[int, _Live] = {}
        self._leaving: list[str] = []
        self._posted: list[Event] = []
        arrivals = [(r.at, False, r.rid) for r in requests]
        cancels = [(max(r.at, r.cancel_at), True, r.rid) for r in requests if r.cancel_at < inf]
        self._inputs = sorted(arrivals + cancels, reverse=True)
        for request in requests:
            self._refuse_too_long(request)

    def _refuse_too_long(self, request: SimRequest) -> None:
        need = self._blocks(request.n_tokens + request.n_output)
        if need > self.config.total_blocks:
            raise UserError(f"{request.rid} needs {need} blocks of {self.config.total_blocks}; simulate a larger pool")

    def _blocks(self, n_tokens: int) -> int:
        return ceil(n_tokens / self.config.block_size) * self.config.blocks_per_column

    # --- the clock ---------------------------------------------------------------------------------------------------

    def wait(self) -> list[Event]:
        """Moves the clock to the next moment at which anything happened; all of it. Empty: nothing ever will."""
        while not self._posted:
            live = self._running()
            moment = self._due() if live is None else self._stop(live, self._due())
            if moment == inf:
                break
            self._happen(moment, live)
        events, self._posted = self._posted, []
        return events

    def _due(self) -> float:
        """When the outside, or a cancelled request that is still at work, wants a stop."""
        next_input = self._inputs[-1][0] if self._inputs else inf
        return self.now if self._leaving else max(self.now, min(next_input, self.timer))

    def _running(self) -> _Live | None:
        """The unit at work; starts the next in the queue if there is none."""
        for state in ("running", "queued"):
            for live in self._live.values():
                if live.state == state:
                    if state == "queued":
                        live.state, live.since = "running", self.now
                    return live
        return None

    def _stop(self, live: _Live, due: float) -> float:
        """The first slice point past now and not before `due`, or the unit's end."""
        end = live.since + live.left
        if due >= end:
            return end
        slices = max(1, ceil((due - live.since) / self.slice_s))
        while live.since + slices * self.slice_s <= self.now:
            slices += 1
        return min(end, live.since + slices * self.slice_s)

    def _happen(self, moment: float, live: _Live | None) -> None:
        """What a moment brings: cancelled rows leave, inputs and the timer come, the unit at work ends."""
        self.now = moment
        while self._leaving:
            self._drop(self._leaving.pop())
        while self._inputs and self._inputs[-1][0] <= self.now:
            self._input(*self._inputs.pop()[1:])
        if self.timer <= self.now:
            self.timer = inf
            self._posted.append(told.Timer())
        if live is not None and live.unit.uid in self._live and self.now >= live.since + live.left:
            self._done(live)

    def _input(self, is_cancel: bool, rid: str) -> None:
        r = self.requests[rid]
        if not is_cancel:
            self._posted.append(r.arrival(self._blocks(r.n_tokens + 1)))
        elif r.ended_at is None:
            self._posted.append(told.Cancel(rid))
            if any(s.rid == rid for live in self._live.values() for s in live.segments if live.state == "running"):
                self._leaving.append(rid)
            else:
                self._drop(rid)

    # --- effects of a plan -------------------------------------------------------------------------------------------

    def apply(self, plan: Plan, view: View) -> None:
        """In the engine's order: preempt, admit, yield, resume, submit."""
        for rid, how in plan.preempt:
            self._preempt(rid, how)
        for rid in plan.admit:
            self._admit(rid)
        for uid in plan.yield_:
            self._yield(uid)
        for uid in plan.resume:
            live = self._live[uid]
            live.state, live.since = ("running", self.now) if live.state == "yielded" else (live.state, live.since)
        for unit in plan.submit:
            self._submit(unit, view)
        self.timer = inf if plan.wake_at is None else plan.wake_at

    def _admit(self, rid: str) -> None:
        request, held = self.requests[rid], self._held.get(rid)
        need = self._blocks(request.n_known + 1)
        if held is None and need > self.free:
            self._posted.append(told.NotAdmitted(rid, need, free_blocks=self.free))
            return
        if held is None:
            self.free -= need
            held = _Held(need // self.config.blocks_per_column, [request.n_hit] * self.config.num_layers)
            self._held[rid] = held
        held.parked = False
        request.admitted_at.append(self.now)
        self._posted.append(told.Admitted(rid, request.n_hit, free_blocks=self.free))

    def _preempt(self, rid: str, how: PreemptHow) -> None:
        need = 0
        if any(len(live.segments) > 1 for live in self._live.values() if any(s.rid == rid for s in live.segments)):
            raise ValueError(f"{rid} shares a live unit and can't be preempted")
        self._held[rid].parked = True
        if how == "recompute":
            need = self._blocks(self.requests[rid].n_known + 1)
            self._release(rid)
        self._posted.append(told.Preempted(rid, how, need, free_blocks=self.free))
        self._leave_units(rid)

    def _yield(self, uid: int) -> None:
        live = self._live.get(uid)
        if live is not None and live.state == "running" and live.unit.yield_at != "none":
            ran = self.now - live.since
            live.state, live.left = "yielded", live.left - ran
            self._posted.append(told.UnitYielded(uid, (0, ""), ran, free_blocks=self.free))

    def _submit(self, unit: WorkUnit, view: View) -> None:
        for segment in unit.segments:
            self._check(segment)
            held = self._held[segment.rid]
            grow = max(0, ceil(segment.tok[1] / self.config.block_size) - held.columns)
            held.columns += grow
            self.free -= grow * self.config.blocks_per_column
        if self.free < 0 or unit.uid in self._live or not unit.segments:
            raise ValueError(f"no such unit can be submitted: {unit}, {self.free} blocks free")
        self._live[unit.uid] = _Live(unit, list(unit.segments), self.cost.unit(unit, view))

    def _check(self, segment: Segment) -> None:
        """The rules of a segment that the engine, too, relies on."""
        request, held = self.requests[segment.rid], self._held[segment.rid]
        busy = any(s.rid == segment.rid for live in self._live.values() for s in live.segments)
        is_decode = segment.kind == "decode"
        span = (request.n_tokens, request.n_known) if is_decode else (0, request.n_tokens)
        fits = span[0] <= segment.tok[0] and (segment.tok[1] == span[1] if is_decode else segment.tok[1] <= span[1])
        lawful = legal(held.f, segment, request.barriers, request.n_tokens)
        if busy or held.parked or segment.rid in self._leaving or not (fits and lawful):
            raise ValueError(f"illegal segment {segment}: f={held.f}, known={request.n_known}, busy={busy}")

    # --- how things end ----------------------------------------------------------------------------------------------

    def _done(self, live: _Live) -> None:
        del self._live[live.unit.uid]
        sampled, grow, finished = {}, {}, []
        for segment in live.segments:
            rid, request, held = segment.rid, self.requests[segment.rid], self._held[segment.rid]
            for layer in range(*segment.layer):
                held.f[layer] = segment.tok[1]
            if held.f[-1] < request.n_known:
                continue
            sampled[rid] = 1
            request.token_at.append(self.now)
            grow[rid] = max(0, self._blocks(request.n_known) - held.columns * self.config.blocks_per_column)
            if len(request.token_at) == request.n_output:
                finished.append(rid)
                self._release(rid)
                request.ended_at = self.now
        ran = self.now - live.since
        self._posted.append(told.UnitDone(live.unit.uid, ran, sampled, grow, tuple(finished), free_blocks=self.free))

    def _drop(self, rid: str) -> None:
        """A cancelled request leaves; one that finished meanwhile has left already."""
        if self.requests[rid].ended_at is None:
            self._release(rid)
            self.requests[rid].ended_at = self.now
            self._posted.append(told.Cancelled(rid, free_blocks=self.free))
            self._leave_units(rid)

    def _release(self, rid: str) -> None:
        held = self._held.pop(rid, None)
        self.free += held.columns * self.config.blocks_per_column if held else 0

    def _leave_units(self, rid: str) -> None:
        """A unit that loses its last request ends at once."""
        for live in [live for live in self._live.values() if any(s.rid == rid for s in live.segments)]:
            live.segments = [s for s in live.segments if s.rid != rid]
            if not live.segments:
                live.left = self.now - live.since if live.state == "running" else 0.0
                live.since = live.since if live.state == "running" else self.now
                self._done(live)
