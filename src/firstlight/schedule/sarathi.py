"""`sarathi`, the default schedule: every unit carries all running decodes and prompt chunks up to a token budget.

The idea is that of SARATHI (arXiv 2308.16369) and Sarathi-Serve (arXiv 2403.02310): rows of a decode ride almost free
in the matrix products of a prompt chunk, and a bounded chunk bounds the wait of the decodes beside it. Ours adds two
things. The budget is lifted for a prompt that is alone: it runs as one *long* unit that stops within a slice when
company comes, and from then on shares the machine in fair halves. And a piece that can't be cut to fit the budget (a
whole prompt, the replay of a preempted request's generated tokens) is such a long unit too: nothing else waits on it.

What holds, with B = the budget and M = `max_num_seqs` < B:

- Rows: a unit has at most B of them, but for long units, which hold one segment.
- Decodes: a decode is in every unit that isn't long, and two long stretches never follow each other while others can
  run. A long stretch gives way at the first slice point after the running time of the unit before it. So the gap
  between two tokens of a request that isn't preempted is at most two units of B rows and one slice.
- Prompts: the first prompt in rank gets at least B - M + 1 rows of every unit, or half of the time as a long unit.
- Ageing: rank = arrival + priority * `ageing_s`, lower first, for ever. Prompts are admitted and served in order of
  rank without skipping (only a long one that waits for its turn lets the others have theirs), so a request is overtaken
  only by those of a smaller priority number that arrive less than (difference of the numbers) * `ageing_s` seconds
  after it; equal priorities are served in order of arrival.
- Memory: a prompt is admitted when all its blocks are there. If the decodes' next blocks are not, the last in rank is
  preempted by recompute, never the first: it always finishes, so every request does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from firstlight.core.errors import UserError
from firstlight.core.parts import Capability
from firstlight.core.schedule import Event, Plan, Segment, WorkUnit
from firstlight.core.view import RequestView, UnitView, View, ViewConfig

KEPT_GROUP = 64
"""Ordinals that one figure of `RequestView.kept` speaks for."""


@dataclass(frozen=True)
class SarathiConfig:
    """Raises UserError on values that no schedule can follow."""

    token_budget: int = field(default=512, metadata={"doc": "rows of a unit at most, decodes included"})
    ageing_s: float = field(default=10.0, metadata={"doc": "seconds of waiting that make up for one step of priority"})
    lift: bool = field(default=True, metadata={"doc": "run a prompt that is alone as one unit, whatever its length"})

    def __post_init__(self) -> None:
        if self.token_budget < 2:
            raise UserError(f"sarathi: token_budget={self.token_budget} is too small; give 2 or more")
        if not 0 <= self.ageing_s < float("inf"):
            raise UserError(f"sarathi: ageing_s={self.ageing_s} is no length of time; give 0 seconds or more")


class Sarathi:
    """The schedule part of `sarathi`; see the head of this file for what it guarantees."""

    name = "sarathi"
    seam = "schedule"
    Config = SarathiConfig
    capability = Capability(exact=True, alters_cells=False)

    def __init__(self, config: SarathiConfig, view_config: ViewConfig) -> None:
        self.config, self.num_layers = config, view_config.num_layers
        self.max_num_seqs = view_config.max_num_seqs
        self.budget = min(config.token_budget, view_config.max_num_batched_tokens)
        if self.max_num_seqs >= self.budget:
            raise UserError(
                f"{self.max_num_seqs} decodes would fill a unit of {self.budget} tokens and stop all prompts; "
                "raise token_budget and max-num-batched-tokens, or lower max-num-seqs"
            )

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan:
        admit = self._admit(view)
        busy = {segment.rid for live in view.units.values() for segment in live.unit.segments}
        ready = [r for r in self._ranked(view) if r.state == "running" and r.rid not in busy]
        running = next((live for live in view.units.values() if live.state == "running"), None)
        if running is not None:
            return self._beside(running, now, view, ready, admit)
        if admit:
            # The answer comes at once, and the next unit should know it.
            return Plan(admit=admit, memo=dict(view.memo))
        return self._next(now, view, ready)

    def _ranked(self, view: View) -> list[RequestView]:
        return sorted(view.requests.values(), key=lambda r: r.arrival + r.priority * self.config.ageing_s)

    def _admit(self, view: View) -> tuple[str, ...]:
        """Waiting requests, strictly in order, while their whole prompts fit beside the running decodes' growth."""
        if not any(r.is_waiting for r in view.requests.values()):
            return ()
        free = view.free_blocks - sum(r.grow for r in view.requests.values())
        seats = self.max_num_seqs - sum(not r.is_waiting for r in view.requests.values())
        admit: list[str] = []
        for request in (r for r in self._ranked(view) if r.is_waiting):
            free -= request.need_blocks
            if free < 0 or len(admit) >= seats:
                break
            admit.append(request.rid)
        return tuple(admit)

    def _beside(
        self, running: UnitView, now: float, view: View, ready: list[RequestView], admit: tuple[str, ...]
    ) -> Plan:
        """A unit runs. Only a long one gives way: to anything that can run, but not before its turn is over."""
        memo = dict(view.memo)
        if running.unit.yield_at == "none" or not (admit or self._pack(ready)):
            return Plan(admit=admit, memo=memo)
        until = memo.get("until", now)
        if now < until:
            return Plan(admit=admit, wake_at=until, memo=memo)
        return Plan(admit=admit, yield_=(running.unit.uid,), memo=memo)

    def _next(self, now: float, view: View, ready: list[RequestView]) -> Plan:
        """No unit runs: the long one and the others take turns."""
        held = next(iter(view.units.values()), None)
        alone = None if held else self._long(ready)
        segments = self._pack([r for r in ready if alone is None or r.rid != alone.rid])
        its_turn = not segments or view.last is None or view.last.yield_at == "none"
        if its_turn and (alone or (held and _is_wanted(held, view))):
            until = now + view.last_s if segments else None
            memo = {} if until is None else {"until": until}
            if held:
                return Plan(resume=(held.unit.uid,), wake_at=until, memo=memo)
            assert alone is not None
            return Plan(submit=(WorkUnit(view.next_uid, (alone,), "slice"),), wake_at=until, memo=memo)
        return self._submit(view, segments)

    def _submit(self, view: View, segments: tuple[Segment, ...]) -> Plan:
        """A unit of the others, once the blocks that its decodes grow into are there."""
        growth = sum(view.requests[s.rid].grow for s in segments if s.kind == "decode")
        if growth > view.free_blocks:
            last = [r for r in self._ranked(view) if r.state == "running"][1:][-1:]
            return Plan(preempt=tuple((r.rid, "recompute") for r in last))
        return Plan(submit=(WorkUnit(view.next_uid, segments),)) if segments else Plan()

    def _pack(self, ready: list[RequestView]) -> tuple[Segment, ...]:
        """All decodes, and in order of rank the chunks that fit the budget beside them; decode rows last."""
        decodes = [self._decode(r) for r in ready if r.is_decoding]
        room = self.budget - len(decodes)
        chunks: list[Segment] = []
        for request in (r for r in ready if not r.is_decoding):
            chunk, rows = self._chunk(request, room)
            if chunk is None:
                break
            chunks.append(chunk)
            room -= rows
        chunks.sort(key=lambda s: s.kind == "decode")
        return (*chunks, *decodes)

    def _long(self, ready: list[RequestView]) -> Segment | None:
        """The first prompt or replay in rank, if it is alone or indivisible, and too long for the budget."""
        first = next((r for r in ready if not r.is_decoding), None)
        if first is None or not (_is_whole(first) or (self.config.lift and len(ready) == 1)):
            return None
        segment, rows = self._chunk(first, first.n_known)
        return segment if rows > self.budget - sum(r.is_decoding for r in ready) else None

    def _decode(self, request: RequestView) -> Segment:
        return Segment(request.rid, "decode", (request.f[-1], request.n_known), (0, self.num_layers))

    def _chunk(self, request: RequestView, room: int) -> tuple[Segment | None, int]:
        """The next at most `room` rows of a prompt or of a replay, and their number; None if they don't fit."""
        if not request.is_prefilling:
            rows = request.n_known - request.f[-1]
            return (self._decode(request), rows) if rows <= room else (None, 0)
        l0 = next(layer for layer, done in enumerate(request.f) if done < request.n_tokens)
        t0 = request.f[l0]
        room = room if _is_whole(request) else min(room, request.chunk or room)
        t1, rows = _reach(request, t0, l0, room)
        if t1 == t0 or (_is_whole(request) and t1 < request.n_tokens):
            return None, 0
        one_shot = (t0, t1) == (0, request.n_tokens)
        # Below a barrier the strips wait until all of the prompt is there, unless it comes as one.
        l1 = self.num_layers if one_shot else min((c + 1 for c in request.barriers if c >= l0), default=self.num_layers)
        return Segment(request.rid, "prefill", (t0, t1), (l0, l1)), rows


def _is_whole(request: RequestView) -> bool:
    """Its next segment can't be cut; `whole_prompt` outranks `chunk`."""
    return request.whole_prompt or not request.is_prefilling


def _is_wanted(held: UnitView, view: View) -> bool:
    return any(view.requests[s.rid].state == "running" for s in held.unit.segments)


def _reach(request: RequestView, t0: int, layer: int, room: int) -> tuple[int, int]:
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
