"""`layered`: decodes ride through every unit, and prompts go beside them whole, one group of layers a unit.

Layered prefill (arXiv 2510.08055, section 4): to keep units short, cut prompts by layers where `sarathi` cuts them by
tokens. Each layer then sees a prompt once: its weights (of a mixture of experts: nearly all experts) are read once, and
no chunk reads the keys of the chunks before it again. What waits between two groups is one hidden row a token.

What holds, with R = `stage_tokens` (but `--max-num-batched-tokens` at most) and S = `num_stages`:

- A batch of prompts, in order of rank and of `max_tokens` rows together at most, is closed until it went through all
  groups; only its last prompt may be cut, and goes on in the next batch. A prompt that can't be cut and is longer is a
  batch of its own. Whoever arrives meanwhile waits for the next batch.
- A batch of T rows goes in min(S, T / R rounded up, layers) groups: each unit costs about what R rows cost, and
  T / S rows if that is more. While nothing decodes there is nobody to spare, and all layers are one group.
- Decodes: each is in every unit. What is replayed after a preemption can't be cut in either way: it is a unit with the
  decodes.
- Memory: rows that wait between two groups are those of one batch at most, and are in `parked_bytes`. A request that is
  preempted or cancelled between two groups leaves the batch, and its rows are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.schedule import Plan, Segment, legal
from firstlight.core.view import RequestView, View, ViewConfig
from firstlight.schedule.lane import OneLane, check_seconds

Batch = dict[str, Any]
"""As the memo has it. `cells`: request -> (t0, t1, l0, l1); `next`, `groups`: numbers of groups."""


@dataclass(frozen=True)
class LayeredConfig:
    """Raises UserError on values that no schedule can follow."""

    stage_tokens: int = field(default=512, metadata={"doc": "rows whose whole prefill one unit may cost"})
    num_stages: int = field(default=16, metadata={"doc": "groups of layers at most"})
    max_tokens: int = field(default=8192, metadata={"doc": "prompt rows of a batch; longer prompts are cut"})
    ageing_s: float = field(default=10.0, metadata={"doc": "seconds of waiting that make up for one step of priority"})

    def __post_init__(self) -> None:
        for key in ("stage_tokens", "num_stages", "max_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"layered: {key}={getattr(self, key)} is too small; give 1 or more")
        check_seconds("layered", ageing_s=self.ageing_s)


class Layered(OneLane):
    """The schedule part of `layered`; see the head of this file for what it guarantees."""

    Config = LayeredConfig

    def __init__(self, config: LayeredConfig, view_config: ViewConfig) -> None:
        super().__init__(view_config, config.ageing_s)
        self.config = config
        self.stage_tokens = min(config.stage_tokens, view_config.max_num_batched_tokens)

    def next(self, view: View, ready: list[RequestView]) -> Plan:
        """The batch's next group, or the first one of the next batch, beside all decodes."""
        decodes = self.decodes(ready)
        batch = self._in_flight(view)
        if not batch["cells"]:
            first = next((r for r in ready if not r.is_decoding), None)
            if first is not None and not first.is_prefilling:
                replay, _ = self.chunk(first, first.n_known)
                assert replay is not None
                return self.submit(view, (replay, *decodes), {})
            batch = self._form(ready, bool(decodes))
        segments: tuple[Segment, ...] = ()
        while batch["cells"] and not segments:
            segments, batch = self._group(batch)
        return self.submit(view, (*segments, *decodes), batch if batch["cells"] else {})

    def _in_flight(self, view: View) -> Batch:
        """The batch without those that were cancelled or preempted: what they left is not what the next group needs."""
        batch: Batch = {"next": 0, "groups": 1, "cells": {}, **view.memo}
        first = self._bound(batch["next"], batch["groups"])
        return batch | {"cells": {rid: c for rid, c in batch["cells"].items() if _is_at(view, rid, c, first)}}

    def _form(self, ready: Sequence[RequestView], has_decodes: bool) -> Batch:
        """The next batch: prompts in order of rank while they fit."""
        cells: dict[str, tuple[int, int, int, int]] = {}
        room = total = self.config.max_tokens
        for request in (r for r in ready if r.is_prefilling):
            segment, rows = self.chunk(request, room)
            if segment is None and not cells:
                segment, rows = self.chunk(request, request.n_tokens)
            if segment is None:
                break
            cells[request.rid] = (*segment.tok, *segment.layer)
            room -= rows
            if room <= 0:
                break
        groups = min(self.config.num_stages, -(-(total - room) // self.stage_tokens), self.num_layers)
        return {"cells": cells, "next": 0, "groups": max(groups, 1) if has_decodes else 1}

    def _group(self, batch: Batch) -> tuple[tuple[Segment, ...], Batch]:
        """The segments of the next group, and the batch once they are under way: those who have layers left above."""
        number, groups = batch["next"], batch["groups"]
        first, end = (self._bound(n, groups) for n in (number, number + 1))
        segments = tuple(
            Segment(rid, "prefill", (t0, t1), (max(l0, first), min(l1, end)))
            for rid, (t0, t1, l0, l1) in batch["cells"].items()
            if max(l0, first) < min(l1, end)
        )
        above = {rid: cells for rid, cells in batch["cells"].items() if cells[3] > end}
        return segments, batch | {"next": number + 1, "cells": above}

    def _bound(self, number: int, groups: int) -> int:
        """Where a group begins: the first (layers mod groups) of them have one layer more."""
        size, longer = divmod(self.num_layers, groups)
        return number * size + min(number, longer)


def _is_at(view: View, rid: str, cells: Sequence[int], layer: int) -> bool:
    """Whether a request is where its batch is: the rest of its cells, from a layer on, may be next."""
    request, (t0, t1, l0, l1) = view.requests.get(rid), cells
    if request is None or request.state != "running":
        return False
    return legal(request.f, Segment(rid, "prefill", (t0, t1), (max(l0, layer), l1)))
