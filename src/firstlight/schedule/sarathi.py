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
- Ageing: prompts are admitted and served in order of rank (`schedule/lane.py`) without skipping; only a long one that
  waits for its turn lets the others have theirs. So a request is overtaken only by those of a smaller priority number
  that arrive less than (difference of the numbers) * `ageing_s` seconds after it; equal priorities are served in order
  of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.schedule import Plan, Segment, WorkUnit
from firstlight.core.view import RequestView, UnitView, View, ViewConfig
from firstlight.schedule.lane import OneLane, check_seconds, is_wanted, is_whole


@dataclass(frozen=True)
class SarathiConfig:
    """Raises UserError on values that no schedule can follow."""

    token_budget: int = field(default=512, metadata={"doc": "rows of a unit at most, decodes included"})
    ageing_s: float = field(default=10.0, metadata={"doc": "seconds of waiting that make up for one step of priority"})
    lift: bool = field(default=True, metadata={"doc": "run a prompt that is alone as one unit, whatever its length"})

    def __post_init__(self) -> None:
        if self.token_budget < 2:
            raise UserError(f"sarathi: token_budget={self.token_budget} is too small; give 2 or more")
        check_seconds("sarathi", ageing_s=self.ageing_s)


class Sarathi(OneLane):
    """The schedule part of `sarathi`; see the head of this file for what it guarantees."""

    Config = SarathiConfig

    def __init__(self, config: SarathiConfig, view_config: ViewConfig) -> None:
        super().__init__(view_config, config.ageing_s)
        self.config = config
        self.budget = min(config.token_budget, view_config.max_num_batched_tokens)
        if self.max_num_seqs >= self.budget:
            raise UserError(
                f"{self.max_num_seqs} decodes would fill a unit of {self.budget} tokens and stop all prompts; "
                "raise token_budget and max-num-batched-tokens, or lower max-num-seqs"
            )

    def beside(self, running: UnitView, view: View, ready: list[RequestView], admit: tuple[str, ...]) -> Plan:
        """Only a long unit gives way: to anything that can run, but not before its turn is over."""
        memo = dict(view.memo)
        if running.unit.yield_at == "none" or not (admit or self._pack(ready)):
            return Plan(admit=admit, memo=memo)
        until = memo.get("until", view.now)
        if view.now < until:
            return Plan(admit=admit, wake_at=until, memo=memo)
        return Plan(admit=admit, yield_=(running.unit.uid,), memo=memo)

    def next(self, view: View, ready: list[RequestView]) -> Plan:
        """The long one and the others take turns."""
        held = next(iter(view.units.values()), None)
        alone = None if held else self._long(ready)
        segments = self._pack([r for r in ready if alone is None or r.rid != alone.rid])
        its_turn = not segments or view.last is None or view.last.yield_at == "none"
        if its_turn and (alone or (held and is_wanted(held, view))):
            until = view.now + view.last_s if segments else None
            memo: dict[str, Any] = {} if until is None else {"until": until}
            if held:
                return Plan(resume=(held.unit.uid,), wake_at=until, memo=memo)
            assert alone is not None
            return Plan(submit=(WorkUnit(view.next_uid, (alone,), "slice"),), wake_at=until, memo=memo)
        return self.submit(view, segments, {})

    def _pack(self, ready: list[RequestView]) -> tuple[Segment, ...]:
        """All decodes, and in order of rank the chunks that fit the budget beside them; decode rows last."""
        decodes = self.decodes(ready)
        room = self.budget - len(decodes)
        chunks: list[Segment] = []
        for request in (r for r in ready if not r.is_decoding):
            chunk, rows = self.chunk(request, room)
            if chunk is None:
                break
            chunks.append(chunk)
            room -= rows
        chunks.sort(key=lambda s: s.kind == "decode")
        return (*chunks, *decodes)

    def _long(self, ready: list[RequestView]) -> Segment | None:
        """The first prompt or replay in rank, if it is alone or indivisible, and too long for the budget."""
        first = next((r for r in ready if not r.is_decoding), None)
        if first is None or not (is_whole(first) or (self.config.lift and len(ready) == 1)):
            return None
        segment, rows = self.chunk(first, first.n_known)
        return segment if rows > self.budget - sum(r.is_decoding for r in ready) else None
