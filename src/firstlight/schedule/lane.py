"""What the schedules of one lane do alike: ranks that age, admission, decode rows, pieces of prompts, preemption.

A schedule derives from `OneLane` and says what runs next. What holds for all of them:

- One unit runs at a time. Each decode in it carries its one row through all layers; a piece of a prompt honours what
  its request's methods demand: `chunk`, `whole_prompt`, and barriers, below which strips wait for the whole prompt.
- Ageing: rank = arrival + priority * `ageing_s`, lower first, for ever, unless a schedule ranks otherwise.
- Memory: prompts are admitted in order of rank, without skipping, when all their blocks are there beside the growth of
  running decodes. If the decodes' next blocks are not there, the last in rank is preempted by recompute, never the
  first: it always finishes, so every request does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.core.schedule import Event, Plan, Segment, WorkUnit
from firstlight.core.view import RequestView, UnitView, View, ViewConfig

KEPT_GROUP = 64
"""Ordinals that one figure of `RequestView.kept` speaks for."""


class OneLane:
    """Override `next`, which answers when no unit runs, and what else should be different."""

    seam = "schedule"
    capability = Capability(exact=True, alters_cells=False)

    def __init__(self, view_config: ViewConfig, ageing_s: float) -> None:
        self.num_layers, self.max_num_seqs = view_config.num_layers, view_config.max_num_seqs
        self.ageing_s = ageing_s

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan:
        admit = self.admit(view)
        ready = self.ready(view)
        running = next((live for live in view.units.values() if live.state == "running"), None)
        if running is not None:
            return self.beside(running, view, ready, admit)
        if admit:
            # The answer comes at once, and the next unit should know it.
            return Plan(admit=admit, memo=dict(view.memo))
        return self.next(view, ready)

    # --- what a schedule decides --------------------------------------------------------------------------------------

    def next(self, view: View, ready: list[RequestView]) -> Plan:
        """No unit runs, and nobody is to be admitted: what now? `ready`: whom a new unit may hold, by rank."""
        raise AssertionError(f"{type(self).__name__} doesn't say what runs next")

    def beside(self, running: UnitView, view: View, ready: list[RequestView], admit: tuple[str, ...]) -> Plan:
        """A unit runs: let it."""
        return Plan(admit=admit, memo=dict(view.memo))

    def rank(self, request: RequestView, view: View) -> Any:
        """Lower is first; equal ones go in order of arrival."""
        return request.arrival + request.priority * self.ageing_s

    def admit(self, view: View) -> tuple[str, ...]:
        """Waiting requests, strictly in order, as long as they fit."""
        if not any(r.is_waiting for r in view.requests.values()):
            return ()
        return self.fitting(view, [r for r in self.ranked(view) if r.is_waiting])

    # --- what it decides with -----------------------------------------------------------------------------------------

    def ranked(self, view: View) -> list[RequestView]:
        return sorted(view.requests.values(), key=lambda r: self.rank(r, view))

    def ready(self, view: View) -> list[RequestView]:
        """Admitted requests that no live unit holds, in order of rank."""
        busy = {segment.rid for live in view.units.values() for segment in live.unit.segments}
        return [r for r in self.ranked(view) if r.state == "running" and r.rid not in busy]

    def fitting(self, view: View, waiting: Sequence[RequestView]) -> tuple[str, ...]:
        """The first of some: as many as have seats, and room for whole prompts beside the running decodes' growth."""
        free = view.free_blocks - sum(r.grow for r in view.requests.values())
        seats = self.max_num_seqs - sum(not r.is_waiting for r in view.requests.values())
        admit: list[str] = []
        for request in waiting:
            free -= request.need_blocks
            if free < 0 or len(admit) >= seats:
                break
            admit.append(request.rid)
        return tuple(admit)

    def submit(self, view: View, segments: Sequence[Segment], memo: dict[str, Any]) -> Plan:
        """One unit, once the blocks that its decodes grow into are there; before that, whom to preempt for them."""
        growth = sum(view.requests[s.rid].grow for s in segments if s.kind == "decode")
        if growth > view.free_blocks:
            last = [r for r in self.ranked(view) if r.state == "running"][1:][-1:]
            alone = [r for r in last if not _shares_a_unit(r, view)]
            return Plan(preempt=tuple((r.rid, "recompute") for r in alone), memo=dict(view.memo))
        return Plan(submit=(WorkUnit(view.next_uid, tuple(segments)),), memo=memo) if segments else Plan(memo=memo)

    def decodes(self, ready: Sequence[RequestView]) -> tuple[Segment, ...]:
        """The next row of each request that decodes."""
        return tuple(self._generated(r) for r in ready if r.is_decoding)

    def chunk(self, request: RequestView, room: int) -> tuple[Segment | None, int]:
        """The next at most `room` rows of a prompt or of a replay, and their number; None if they don't fit."""
        if not request.is_prefilling:
            rows = request.n_known - request.f[-1]
            return (self._generated(request), rows) if rows <= room else (None, 0)
        l0 = next(layer for layer, done in enumerate(request.f) if done < request.n_tokens)
        t0 = request.f[l0]
        room = room if is_whole(request) else min(room, request.chunk or room)
        t1, rows = reach(request, t0, l0, room)
        if t1 == t0 or (is_whole(request) and t1 < request.n_tokens):
            return None, 0
        one_shot = (t0, t1) == (0, request.n_tokens)
        # Below a barrier the strips wait until all of the prompt is there, unless it comes as one.
        l1 = self.num_layers if one_shot else min((c + 1 for c in request.barriers if c >= l0), default=self.num_layers)
        return Segment(request.rid, "prefill", (t0, t1), (l0, l1)), rows

    def _generated(self, request: RequestView) -> Segment:
        return Segment(request.rid, "decode", (request.f[-1], request.n_known), (0, self.num_layers))


def is_whole(request: RequestView) -> bool:
    """Its next segment can't be cut; `whole_prompt` outranks `chunk`."""
    return request.whole_prompt or not request.is_prefilling


def is_wanted(live: UnitView, view: View) -> bool:
    """Whether anybody waits for a unit: not all of its requests are being cancelled."""
    return any(view.requests[s.rid].state == "running" for s in live.unit.segments)


def check_seconds(schedule: str, **settings: float) -> None:
    """Raises UserError on a setting that is no length of time."""
    for key, value in settings.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"{schedule}: {key}={value} is no length of time; give 0 or more")


def reach(request: RequestView, t0: int, layer: int, room: int) -> tuple[int, int]:
    """The furthest t1 such that at most `room` rows of [t0, t1) are alive at a layer, and their number."""
    if layer <= request.cut_layer or not request.kept:
        t1 = min(request.n_tokens, t0 + room)
        return t1, t1 - t0
    t1 = t0
    left = room
    while t1 < request.n_tokens:
        end = min((t1 // KEPT_GROUP + 1) * KEPT_GROUP, request.n_tokens)
        rows = min(request.kept[t1 // KEPT_GROUP], end - t1)
        if rows > left:
            return t1 + left, room
        t1, left = end, left - rows
    return t1, room - left


def _shares_a_unit(request: RequestView, view: View) -> bool:
    """A unit that waits half through can't lose one request and go on with the others."""
    units = [{s.rid for s in live.unit.segments} for live in view.units.values()]
    others = {rid for rids in units if request.rid in rids for rid in rids - {request.rid}}
    return any(view.requests[rid].state == "running" for rid in others)
