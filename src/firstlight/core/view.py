"""What a policy may look at: the View, a pure fold of (config, events, plans) and of nothing else.

It sits between the engine's events and `Policy.step`. The engine never writes into it: a fact reaches a policy in an
event or not at all, so whoever has the event log has every view, and a replay can be compared byte by byte.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from firstlight.core import schedule as told
from firstlight.core.schedule import Account, Arrival, Event, Plan, Preempted, Segment, UnitDone, WorkUnit

T = TypeVar("T")
RequestState = Literal["waiting", "admitting", "running", "preempted", "parked", "cancelled"]
_FACTS = tuple(field.name for field in fields(Arrival))


@dataclass(frozen=True)
class ViewConfig:
    """All that a policy knows before the first event; plain JSON, the head of every event log.

    A column is the `blocks_per_column` blocks (one per layer and KV head) of the same `block_size` tokens.
    `schedule` is {"name": ..., "settings": {...}} of the policy.
    """

    num_layers: int
    blocks_per_column: int
    total_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 64
    seed: int = 0
    schedule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestView:
    """One request: its arrival's facts, and how far it got.

    `f[l]` = ordinal below which every row alive at layer l is finished. `kept[i]` = rows alive above layer `cut_layer`
    of the ordinals [64 i, 64 i + 64), empty while nothing was cut. `grow` = blocks that its next token takes.
    "preempted" is waiting again after a recompute; "cancelled" lasts until the engine says that the request is gone.
    """

    rid: str
    n_tokens: int
    n_uncached: int
    need_blocks: int
    max_tokens: int
    whole_prompt: bool
    chunk: int | None
    barriers: tuple[int, ...]
    priority: int
    tenant: str
    ttft_slo_s: float | None
    arrival: float
    f: tuple[int, ...]
    state: RequestState = "waiting"
    n_cached: int = 0
    n_generated: int = 0
    grow: int = 0
    cut_layer: int = -1
    kept: tuple[int, ...] = ()

    @property
    def n_known(self) -> int:
        """Prompt and generated tokens: the ordinal of the next token to come."""
        return self.n_tokens + self.n_generated

    @property
    def is_waiting(self) -> bool:
        """Asks for admission; holds no block, or only parked ones."""
        return self.state in ("waiting", "preempted", "parked")

    @property
    def is_prefilling(self) -> bool:
        """Prompt cells are still missing."""
        return self.f[-1] < self.n_tokens

    @property
    def is_decoding(self) -> bool:
        """Only one row is missing, that of the token sampled last. False while it replays after a recompute."""
        return not self.is_prefilling and self.f[-1] == self.n_known - 1

    def _with(self, **changes: Any) -> RequestView:
        return _changed(self, changes)


@dataclass(frozen=True)
class UnitView:
    """A live unit. `started` = when it was submitted or last resumed, `executed_s` = seconds run before that."""

    unit: WorkUnit
    state: Literal["running", "yielded"]
    started: float
    executed_s: float = 0.0


@dataclass(frozen=True)
class View:
    """The engine as its events tell it. Requests are in order of arrival; finished and cancelled ones are gone.

    `last` is the unit that stopped last, after `last_s` seconds; `free_blocks` = free + evictable - reserved.
    """

    config: ViewConfig
    step: int
    now: float
    requests: Mapping[str, RequestView]
    units: Mapping[int, UnitView]
    free_blocks: int
    parked_bytes: int = 0
    next_uid: int = 0
    last: WorkUnit | None = None
    last_s: float = 0.0
    memo: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, config: ViewConfig) -> View:
        return cls(config, step=0, now=0.0, requests={}, units={}, free_blocks=config.total_blocks)

    @property
    def rng(self) -> random.Random:
        """A policy's only dice: the same in every replay, fresh in every step."""
        return random.Random(f"{self.config.seed}:{self.step}")

    def after(self, now: float, events: Sequence[Event]) -> View:
        """The view in which a policy answers a batch of events."""
        fold = _Fold(self, now)
        for event in events:
            fold.event(event)
        return fold.view(step=self.step + 1)

    def after_plan(self, plan: Plan) -> View:
        """The view once a plan is under way. Preempted and yielded are told by events, the rest by the plan."""
        fold = _Fold(self, self.now)
        fold.plan(plan)
        return fold.view(memo=plan.memo)


def _changed(base: T, changes: Mapping[str, Any]) -> T:
    """`dataclasses.replace` at a fifth of its cost: this runs a few times a decode token."""
    new = object.__new__(type(base))
    new.__dict__.update(base.__dict__, **changes)
    return new


class _Fold:
    """A view under change: its attributes are those of the view that change."""

    __slots__ = ("__dict__", "base")

    def __init__(self, view: View, now: float) -> None:
        self.base, self.now = view, now
        self.requests, self.units = dict(view.requests), dict(view.units)
        self.free_blocks, self.parked_bytes = view.free_blocks, view.parked_bytes
        self.next_uid, self.last, self.last_s = view.next_uid, view.last, view.last_s

    def view(self, **changes: Any) -> View:
        return _changed(self.base, {**self.__dict__, **changes})

    def plan(self, plan: Plan) -> None:
        for rid in plan.admit:
            self._update(rid, state="admitting")
        for unit in plan.submit:
            self.units[unit.uid] = UnitView(unit, "running", self.now)
            self.next_uid = max(self.next_uid, unit.uid + 1)
            self._take_growth(unit)
        for uid in self.units.keys() & set(plan.resume):
            self.units[uid] = replace(self.units[uid], state="running", started=self.now)

    def _take_growth(self, unit: WorkUnit) -> None:
        """The engine takes a decode's next block at submit; no event says so before the unit ends."""
        for segment in unit.segments:
            if segment.kind == "decode" and (request := self.requests.get(segment.rid)) and request.grow:
                self.free_blocks -= request.grow
                self.requests[segment.rid] = request._with(grow=0)

    def event(self, event: Event) -> None:
        if isinstance(event, Account):
            self.free_blocks, self.parked_bytes = event.free_blocks, event.parked_bytes
        match event:
            case UnitDone():
                self._done(event)
            case told.UnitYielded(uid=uid):
                self._yielded(uid, event.dur)
            case Arrival(rid=rid):
                facts = {name: getattr(event, name) for name in _FACTS}
                self.requests[rid] = RequestView(**facts, arrival=self.now, f=(0,) * self.base.config.num_layers)
            case told.Admitted(rid=rid):
                self._admitted(rid, event.n_cached)
            case told.NotAdmitted(rid=rid):
                parked = rid in self.requests and any(self.requests[rid].f)
                self._update(rid, state="parked" if parked else "waiting", need_blocks=event.need_blocks)
            case told.Cancel(rid=rid):
                self._update(rid, state="cancelled")
            case told.Cancelled(rid=rid):
                self.requests.pop(rid, None)
                self._leave_units(rid)
            case Preempted(rid=rid):
                self._preempted(event)
            case told.Cut(rid=rid):
                self._update(rid, cut_layer=event.layer, kept=event.kept)

    def _update(self, rid: str, **changes: Any) -> None:
        """Nothing brings a cancelled request back; events about one that is gone come too late to matter."""
        if request := self.requests.get(rid):
            stays = {"state": "cancelled"} if request.state == "cancelled" else {}
            self.requests[rid] = request._with(**(changes | stays))

    def _admitted(self, rid: str, n_cached: int) -> None:
        """Parked requests come back with the cells they had."""
        if request := self.requests.get(rid):
            self._update(rid, state="running", n_cached=n_cached, f=tuple(max(done, n_cached) for done in request.f))

    def _preempted(self, event: Preempted) -> None:
        self._leave_units(event.rid)
        changes: dict[str, Any] = {"state": "parked", "need_blocks": event.need_blocks}
        if event.how != "park":
            none_done = (0,) * self.base.config.num_layers
            changes |= {"state": "preempted", "f": none_done, "n_cached": 0, "grow": 0, "cut_layer": -1, "kept": ()}
        if event.how == "restart_dense":
            changes |= {"barriers": (), "chunk": None, "whole_prompt": False}
        self._update(event.rid, **changes)

    def _leave_units(self, rid: str) -> None:
        """A unit goes on without the request; one that waits for a resume has nothing left to do without its last."""
        for uid, live in list(self.units.items()):
            stay = tuple(segment for segment in live.unit.segments if segment.rid != rid)
            if not stay and live.state == "yielded":
                del self.units[uid]
            elif len(stay) < len(live.unit.segments):
                self.units[uid] = replace(live, unit=replace(live.unit, segments=stay))

    def _yielded(self, uid: int, dur: float) -> None:
        live = self.units[uid]
        self.units[uid] = replace(live, state="yielded", executed_s=live.executed_s + dur)
        self.last, self.last_s = live.unit, dur

    def _done(self, event: UnitDone) -> None:
        if live := self.units.pop(event.uid, None):
            self.last, self.last_s = live.unit, event.dur
            for segment in live.unit.segments:
                self._finish(segment, event)
        for rid in event.finished:
            self.requests.pop(rid, None)

    def _finish(self, segment: Segment, event: UnitDone) -> None:
        if (request := self.requests.get(segment.rid)) is None:
            return
        (l0, l1), t1 = segment.layer, segment.tok[1]
        f = request.f[:l0] + (t1,) * (l1 - l0) + request.f[l1:]
        sampled = event.sampled.get(segment.rid, 0) if l1 == len(f) else 0
        grow = event.grow.get(segment.rid, 0)
        self.requests[segment.rid] = request._with(f=f, n_generated=request.n_generated + sampled, grow=grow)
