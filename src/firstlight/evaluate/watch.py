"""Watching one request's prefill from outside of the engine: what each layer took, read, and which cells it made.

A watch stands between the engine and what passes run on (planning, operators, the layers' halves) and takes the time of
each call; at the stops of a pass, where nothing is under way, it looks at what attention has just read. Its own time
counts nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from firstlight.core.request import Request
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.engine.work import Stop, Work
from firstlight.evaluate.sight import KINDS, Sight, cell_size
from firstlight.kernels.contract import AttnCall

WORK = ("planner", "attention", "linears", "rest")
"""What a layer's time goes to; norms, rotation and activation are with the linears that they surround."""
ABSENT, REUSED, COMPUTED, PARKED = range(4)
"""States of a cell."""
_SAMPLED = 4
"""Rows of each band of cells whose attention is looked at."""
_AT_ONCE = 128
"""Rows whose scores are held at once."""


class Record:
    """What was seen of a prompt: L layers, H query heads, a grid of C by C cells of `cell` tokens each."""

    def __init__(self, tokens: int, layers: int, heads: int) -> None:
        self.tokens, self.cell = tokens, cell_size(tokens)
        self.num = -(-tokens // self.cell)
        grid = (heads, self.num, self.num)
        self.seconds = torch.zeros(layers, len(WORK), dtype=torch.float64)
        self.pairs = torch.zeros(layers, len(KINDS), *grid, dtype=torch.int64)
        """(row, key) pairs that were read, by kind of list."""
        self.mass = torch.zeros(layers, *grid)
        """Dense attention, summed over the rows that were sampled."""
        self.sampled = torch.zeros(layers, self.num, dtype=torch.int64)
        """How many rows those are."""
        self.kept = torch.zeros(layers, heads)
        """How much of their attention lies on what was read, summed."""
        self.cells = torch.full((layers, tokens), ABSENT, dtype=torch.uint8)

    @property
    def sample(self) -> Tensor:
        """i64: ordinals of the rows that are sampled, evenly in each band of cells."""
        step = max(self.cell // _SAMPLED, 1)
        return torch.arange(step // 2, self.tokens, step)


class Watch:
    """Sees the first request that comes while it is on; what is computed again is seen again."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._config = engine, engine.machine.model.config
        self.paused_s = 0.0
        """What looking itself has taken."""
        self.live: LiveRequest | None = None
        self.record: Record
        self._starts = -1
        self._layer = 0
        self._began: float | None = None
        self._busy_s = 0.0
        self._call: AttnCall | None = None
        self._known: dict[Any, Tensor] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """The engine is watched meanwhile."""
        engine: Any = self._engine
        machine, told = engine.machine, engine.on_stop
        model, ops, planning, add = machine.model, machine.ops, machine.planning, engine.add
        held = machine.holds
        machine.holds = False
        machine.model = _Between(model, {"qkv": self._linears, "finish": self._linears})
        machine.ops = _Between(ops, {"attend": self._attend})
        machine.planning = _Between(planning, {"plan": self._plan})

        def watched_add(request: Request) -> LiveRequest:
            live: LiveRequest = add(request)
            self.live = self.live or live
            return live

        def on_stop(work: Work, stop: Stop) -> None:
            self._stopped(stop)
            if told is not None:
                told(work, stop)

        engine.add, engine.on_stop = watched_add, on_stop
        try:
            yield
        finally:
            del engine.add
            machine.model, machine.ops, machine.planning, engine.on_stop = model, ops, planning, told
            machine.holds = held

    def _open(self) -> None:
        """An empty record: at the first call of a prefill, and where it begins anew."""
        assert self.live is not None
        if self._starts == self.live.num_preempted:
            return
        began = time.perf_counter()
        self._starts = self.live.num_preempted
        self.record = Record(self.live.num_prompt, self._config.num_layers, self._config.num_heads)
        self.paused_s += time.perf_counter() - began

    # --- time ---------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.perf_counter() - self.paused_s

    def _take(self, layer: int, work: str, call: Callable[..., Any], *args: Any) -> Any:
        """A call of a layer, and its time."""
        self._open()
        began = self._now()
        self._began = began if self._began is None else self._began
        result = call(*args)
        seconds = self._now() - began
        self._busy_s += seconds
        self.record.seconds[layer, WORK.index(work)] += seconds
        return result

    def _linears(self, call: Callable[..., Any], layer: int, *args: Any) -> Any:
        self._look()  # between attention and `finish` there need be no stop
        return self._take(layer, "linears", call, layer, *args)

    def _plan(self, call: Callable[..., Any], model: Any, layer: int, *args: Any) -> Any:
        self._layer = layer
        return self._take(layer, "planner", call, model, layer, *args)

    def _attend(self, call: Callable[..., Any], asked: AttnCall, r0: int, r1: int) -> None:
        if r0 == 0 and not asked.rows.decode[0]:
            self._call = asked
        self._take(self._layer, "attention", call, asked, r0, r1)

    def _stopped(self, stop: Stop) -> None:
        self._look()
        if stop.level != "layer":
            return
        if self._began is not None:
            self.record.seconds[stop.layer, WORK.index("rest")] += self._now() - self._began - self._busy_s
        self._began, self._busy_s = None, 0.0
        if stop.layer == self._config.num_layers - 1:
            self._see_parked()

    # --- looking ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """At the attention call that has begun: what its rows read, what they would have, who was there."""
        call, self._call = self._call, None
        if call is None:
            return
        began = time.perf_counter()
        self._see_cells(call)
        for kv_head in range(len(call.kv[0].length)):
            self._see_pairs(call, kv_head)
            self._see_mass(call, kv_head)
        self._see_sampled(call)
        self.paused_s += time.perf_counter() - began

    def _see_cells(self, call: AttnCall) -> None:
        """Rows of this pass are computed; what else is in the view came from somewhere else."""
        cells, view, tok = self.record.cells[self._layer], call.kv[0], call.rows.tok
        there = (
            torch.arange(max(view.length))
            if view.tok is None
            else torch.cat([of_head[:n] for of_head, n in zip(view.tok, view.length)])
        )
        there = there[there < self.record.tokens]
        cells[there] = torch.where(cells[there] == COMPUTED, COMPUTED, REUSED).to(torch.uint8)
        cells[tok[tok < self.record.tokens]] = COMPUTED

    def _see_parked(self) -> None:
        """Cells above rows that wait in the park store."""
        assert self.live is not None
        for layer in range(1, self._config.num_layers):
            tok = self._engine.machine.park.ordinals(self.live.rid, layer, "cut")
            above = self.record.cells[layer:]
            above[:, tok] = torch.where(above[:, tok] == ABSENT, PARKED, above[:, tok])

    def _see_pairs(self, call: AttnCall, kv_head: int) -> None:
        record, sight = self.record, Sight(call, kv_head, torch.arange(len(call.rows.tok)))
        key = _key(sight)
        if key not in self._known:
            self._known = {key: sight.counts(record.cell, record.num)} | dict(list(self._known.items())[:8])
        of_head = sight.lists[1]
        heads = torch.arange(len(of_head)) + kv_head * len(of_head)
        record.pairs[self._layer][:, heads] += self._known[key][:, :, of_head].transpose(1, 2)

    def _see_mass(self, call: AttnCall, kv_head: int) -> None:
        record = self.record
        sampled = torch.isin(call.rows.tok, record.sample).nonzero()[:, 0]
        for rows in torch.split(sampled, _AT_ONCE):
            sight = Sight(call, kv_head, rows)
            attention, of_head = sight.attention(), sight.lists[1]
            column = torch.nn.functional.one_hot(sight.entries // record.cell, record.num).float()
            heads = slice(kv_head * len(of_head), (kv_head + 1) * len(of_head))
            record.mass[self._layer, heads].index_add_(1, sight.tok // record.cell, attention @ column)
            seen = attention if call.plan is None else attention * sight.mask()[:, of_head].transpose(0, 1)
            record.kept[self._layer, heads] += seen.sum((1, 2))

    def _see_sampled(self, call: AttnCall) -> None:
        tok = call.rows.tok[torch.isin(call.rows.tok, self.record.sample)]
        self.record.sampled[self._layer] += torch.bincount(tok // self.record.cell, minlength=self.record.num)


class _Between:
    """Something whose calls of some names go through somebody else."""

    def __init__(self, inner: Any, through: Mapping[str, Callable[..., Any]]) -> None:
        self._inner, self._through = inner, through

    def __getattr__(self, name: str) -> Any:
        value, through = getattr(self._inner, name), self._through.get(name)
        return value if through is None else lambda *args: through(value, *args)


def _key(sight: Sight) -> tuple[Any, ...]:
    """What counts depend on: equal for heads and layers that read alike."""
    call, view, plan = sight.call, sight.call.kv[0], sight.call.plan
    tensors = [call.rows.tok, sight.entries, *(t[sight.kv_head] for t in (view.pos, view.visible) if t is not None)]
    if plan is not None:
        lists = (plan.blk_ptr, plan.blk_idx, plan.col_ptr, plan.col_idx)
        tensors += [sight.lists[0], plan.tile_map, plan.tile_first, plan.band, *(t for t in lists if t is not None)]
    shape = None if plan is None else (plan.q_tile, plan.blk, plan.num_lists, plan.blk_ptr is None)
    return call.model_window, shape, *(tensor.contiguous().numpy().tobytes() for tensor in tensors)
