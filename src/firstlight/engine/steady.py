"""Decode passes that are alike from step to step: they are recorded once and replayed.

Between two decode steps of the same number of plain rows nothing changes but numbers in memory: where K/V go, how long
views are, what rows hold. So these lie in an `Arena` that stays. The first pass of its kind goes the ordinary way over
it (`SteadyBatch`), while each layer's calls are recorded (kernels/tape.py); from then on a pass (`SteadyPass`) writes
its numbers there for all layers at once and has the calls made again. Whatever isn't plain goes the ordinary way.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from firstlight.cache.table import RequestKV
from firstlight.core.attn import AttnPlan
from firstlight.core.schedule import Segment, WorkUnit
from firstlight.engine.batch import Batch, Block, Member
from firstlight.engine.live import LiveRequest
from firstlight.engine.rates import padded
from firstlight.engine.work import Stop, Work
from firstlight.kernels.contract import AttnRows
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.memory import Memory
from firstlight.kernels.tape import Tape, recording
from firstlight.models.decoder import Decoder

if TYPE_CHECKING:
    from firstlight.engine.machine import Machine

Stride = Callable[[int, int], int]
"""Of so many rows and (row, key) pairs: layers between two stops, 0 = it stops inside layers."""


class Steady:
    """The arenas of one machine, by padded row count."""

    def __init__(self, machine: Machine) -> None:
        self._machine: Machine = weakref.proxy(machine)  # no cycle: a model goes when its last user goes
        self._model = machine.model
        self._arenas: dict[int, Arena] = {}
        self.most = 64 if hasattr(machine.ops, "view_numbers") else 0
        """Rows of a pass that is recorded."""

    def replay(self, unit: WorkUnit, lives: Sequence[LiveRequest], stride: Stride) -> SteadyPass | None:
        """The pass of a unit all of whose layers were recorded; None if it has to go the ordinary way."""
        n, num_layers = len(lives), self._model.config.num_layers
        planned = sum(map(_is_planned, lives))
        arena = self._arenas.get(padded(n))
        if arena is None or n > self.most or arena.is_taken:
            return None
        for live, segment in zip(lives, unit.segments):
            if segment.layer[0] or not _is_steady(live, segment):
                return None
        step = stride(n, sum(segment.tok[1] for segment in unit.segments))
        ends = [*range(step, num_layers, step), num_layers] if step else []
        tapes = arena.tapes(n, planned, ends) if step else []
        return SteadyPass(unit, lives, arena, self._model, list(zip(ends, tapes))) if tapes else None

    def batch(self, members: Sequence[Member]) -> Batch | None:
        """The members' rows in an arena; None if they aren't all plain decode rows, or another pass has it."""
        if not 0 < len(members) <= self.most or not all(_is_steady(m.live, m.segment) for m in members):
            return None
        size = padded(len(members))
        if size not in self._arenas:
            self._arenas[size] = Arena(size, self._machine, members[0].live.kv)
        arena = self._arenas[size]
        return None if arena.is_taken else SteadyBatch(arena, list(members), self._model)


def _is_steady(live: LiveRequest, segment: Segment) -> bool:
    """One row for all layers up to the last, whose place is known and on which no part has a say."""
    one = segment.kind == "decode" and segment.tok[1] - segment.tok[0] == 1 and segment.layer[1] == len(live.f)
    if not one or live.is_governed(decode=True) or live.spans is not None:
        return False
    return not _is_planned(live) or (live.planner is not None and live.planner.by_place)


def _is_planned(live: LiveRequest) -> bool:
    """Whether a planner says what generated tokens read."""
    return live.planner is not None and not live.planner.prompt_only


@dataclass(frozen=True, slots=True)
class Seat:
    """What a row takes from its request, until its ordinal or an entry of it comes to lie in another block of 64."""

    table: Any = None
    first: int = 0
    end: int = 0
    """Ordinals [first, end)."""
    slots: Any = None
    """i64 [L, Hkv]: where the first one's entry goes."""
    lengths: Any = None
    """i64 [L, Hkv]: what rows of the table hold with it."""
    turns: Any = None
    """f32 [2, bases, end - first, d]: cos and sin."""
    plans: Sequence[AttnPlan | None] = ()
    """Of each layer, kept: the numbers of a plan are addresses."""


class Arena:
    """Buffers for `size` rows, and the tapes of passes over them.

    A pass has it as long as it, or its batch, lives.
    """

    def __init__(self, size: int, machine: Machine, kv: RequestKV) -> None:
        model, ops = machine.model, machine.ops
        c = model.config
        self._machine, self._model = machine, model
        self.x = torch.zeros(size, c.hidden_size)
        self.tok = torch.zeros(size, dtype=torch.int64)
        """Ordinals, and positions: all rows are as they were made."""
        self._turns = torch.stack(model.rope(self.tok))
        self.cos, self.sin = self._turns
        self.attended = torch.zeros(size, c.num_heads, c.head_dim, dtype=model.dtype)
        self.blocks = [Block(0, size, self.x, self.cos, self.sin)]
        self.slots = torch.zeros(c.num_layers, size, c.num_kv_heads, dtype=torch.int64)
        self.views = np.zeros((c.num_layers, size, ops.view_numbers([kv.view(0)]).shape[1]), np.int64)
        """Of each layer, for all rows: i64 [size, ..]."""
        self.plans = np.zeros((c.num_layers, size, *ops.plan_numbers(None).shape), np.int64)
        self._no_query = torch.zeros(1, c.num_heads, c.head_dim, dtype=model.dtype)
        self.lengths = self.views[:, :, -c.num_kv_heads :]
        """[L, size, Hkv]: what rows of tables hold with the pass."""
        self._numbers = [t.numpy() for t in (self.x, self.tok, self._turns, self.slots)]
        """Of a pass, for all layers: the same memory, which is written more cheaply this way."""
        self._seats = [Seat()] * size
        self._memory = Memory()
        self._tapes: dict[tuple[int, ...], Tape] = {}
        """By rows, those with a plan, threads and layers [first, end); the head is a layer more."""
        self._logits: dict[int, Tensor] = {}
        """What the head's tapes write, by rows: in memory that the next pass writes again."""
        self._rows: dict[tuple[int, int], AttnRows] = {}
        self._taker: weakref.ref[Any] | None = None

    @property
    def is_taken(self) -> bool:
        return self._taker is not None and self._taker() is not None

    def take(self, taker: Any) -> None:
        self._taker = weakref.ref(taker)

    def fill(self, rows: Sequence[tuple[LiveRequest, int]]) -> None:
        """The numbers of a pass that begins, or that some have left: each row's request and ordinal."""
        x, tok, turns, slots = self._numbers
        x[len(rows) :], tok[len(rows) :] = 0, 0
        for i, (live, ordinal) in enumerate(rows):
            seat = self._seats[i]
            if seat.table is not live.kv.table or not seat.first <= ordinal < seat.end:
                seat = self._seats[i] = self._seat(i, live, ordinal)
            place = ordinal - seat.first
            tok[i] = ordinal
            turns[:, :, i] = seat.turns[:, :, place]
            slots[:, i] = seat.slots + place
            self.lengths[:, i] = seat.lengths + place

    def enter(self, x: Tensor) -> None:
        """The rows that go through the layers, f32 [n, D]."""
        self._numbers[0][: len(x)] = x.numpy()

    def rows(self, lo: int, hi: int) -> AttnRows:
        """Rows [lo, hi), one a request. Recorded calls point to what a backend keeps in its memo."""
        if (lo, hi) not in self._rows:
            tok = self.tok[lo:hi]
            self._rows[lo, hi] = AttnRows(range(hi - lo + 1), tok, tok, [True] * (hi - lo))
        return self._rows[lo, hi]

    def _seat(self, i: int, live: LiveRequest, ordinal: int) -> Seat:
        """Row i reads and writes this request's table, which lies where it lies until it grows."""
        self._seats[i] = Seat()  # a planner may raise, and then nobody sits here
        kv, layers = live.kv, range(len(self.views))
        one = kv.places((0, len(layers)), *[torch.tensor([ordinal])] * 2)
        assert one is not None, "a steady row is the next one in all layers"
        end = ordinal + int((BLOCK - np.append(one.ends - 1, ordinal) % BLOCK).min())
        ordinals = torch.arange(ordinal, end)
        kv.places((0, len(layers)), ordinals, ordinals)  # so that they are listed
        self.views[:, i] = self._machine.ops.view_numbers([kv.view(layer) for layer in layers])
        plans = [self._plan(live, layer, ordinals[-1:]) for layer in layers] if _is_planned(live) else []
        self.plans[:, i] = [self._machine.ops.plan_numbers(plan) for plan in plans] if plans else 0
        turns = torch.stack(self._model.rope(ordinals)).numpy()
        return Seat(kv.table, ordinal, end, one.slots[:, 0].numpy(), one.ends, turns, plans)

    def _plan(self, live: LiveRequest, layer: int, tok: Tensor) -> AttnPlan | None:
        segment = Segment(live.rid, "decode", (int(tok), int(tok) + 1), (0, len(self.views)))
        member = Member(live, segment, tok, tok, self.x[:1])
        return self._machine.planning.plan(self._model, layer, member, self._no_query, None)

    # --- tapes --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self, n: int, planned: int, layer: int) -> Iterator[None]:
        """Around a layer of n rows, or the head, unless it was recorded before."""
        key = _key(n, planned, layer, layer + 1)
        if key in self._tapes:
            yield
            return
        with recording(self._memory) as tape:
            yield
        self._tapes[key] = tape

    def tapes(self, n: int, planned: int, ends: Sequence[int]) -> list[Tape]:
        """Of stretches of layers, by their ends, and of the head with the last; none if one can't be replayed."""
        tapes = [
            self._tape(n, planned, layer, end) for layer, end in zip((0, *ends), (*ends[:-1], len(self.views) + 1))
        ]
        whole = [tape for tape in tapes if tape is not None]
        return whole if len(whole) == len(tapes) else []

    def _tape(self, n: int, planned: int, layer: int, end: int) -> Tape | None:
        """Of these layers, joined from theirs when first asked for."""
        tapes, key = self._tapes, _key(n, planned, layer, end)
        if key not in tapes:
            parts = [tapes.get(_key(n, planned, a, a + 1)) for a in range(layer, end)]
            whole = [part for part in parts if part is not None and part.is_whole]
            if len(whole) < end - layer:
                return None
            tapes[key] = Tape()
            for part in whole:
                tapes[key].extend(part)
        return tapes[key] if tapes[key].is_whole else None

    def head(self, n: int, planned: int) -> Tensor:
        """Logits of the first n rows, f32 [n, V], from the tape if there is one."""
        top = len(self.views)
        if (tape := self._tape(n, planned, top, top + 1)) is not None:
            tape.run()
        else:
            with self.recording(n, planned, top):
                self._logits[n] = self._model.head(self.x[:n])
        return self._logits[n]

    def logits(self, n: int) -> Tensor:
        """What a replayed head has given, f32 [n, V]."""
        return self._logits[n]


def _key(n: int, planned: int, layer: int, end: int) -> tuple[int, ...]:
    return n, planned, torch.get_num_threads(), layer, end


class SteadyBatch(Batch):
    """A batch in an arena, whose layers are recorded."""

    def __init__(self, arena: Arena, members: list[Member], model: Decoder) -> None:
        self._arena = arena
        arena.take(self)
        super().__init__(members, model)

    def _gather(self, model: Decoder) -> None:
        arena, members = self._arena, self.members
        x = torch.cat([m.x for m in members])  # a copy: they may be views of the arena
        arena.fill([(m.live, m.segment.tok[0]) for m in members])
        self._planned = sum(_is_planned(m.live) for m in members)
        arena.enter(x)
        for i, m in enumerate(members):
            m.lo, m.x = i, arena.x[i : i + 1]
        self.x, self.cos, self.sin = arena.x, arena.cos, arena.sin
        self.tok = self.pos = arena.tok[: self.n]
        self._scratch["attended"] = arena.attended

    @property
    def is_plain(self) -> bool:
        return False  # its layers are recorded

    def head(self, model: Decoder) -> Tensor:
        return self._arena.head(self.n, self._planned)

    def recording(self, layer: int) -> contextlib.AbstractContextManager[None]:
        return self._arena.recording(self.n, self._planned, layer)

    def blocks(self, step: int) -> list[Block]:
        return self._arena.blocks

    def places(self, layer: int) -> tuple[Tensor, Iterable[Any]] | None:
        return self._arena.slots[layer, : self.n], self._arena.lengths[layer, : self.n]

    def numbers(self, layer: int, members: Sequence[Member]) -> Any:
        lo, hi = members[0].lo, members[-1].hi
        return self._arena.views[layer, lo:hi], self._arena.plans[layer, lo] if members[0].planner else None, None

    def _rows(self, members: Sequence[Member]) -> AttnRows:
        return self._arena.rows(members[0].lo, members[-1].hi)


class SteadyPass(Work):
    """A pass of plain decode rows, from the tapes of stretches of its layers; between two of them it can wait.

    A row whose request is cancelled stays until the pass ends, and has no logits.
    """

    def __init__(
        self,
        unit: WorkUnit,
        lives: Sequence[LiveRequest],
        arena: Arena,
        model: Decoder,
        tapes: Sequence[tuple[int, Tape]],
    ) -> None:
        """`tapes`: each with the layer before which it ends."""
        super().__init__(unit, lives)
        self._arena, self._model, self._tapes = arena, model, tapes
        rows = [(live, segment.tok[0]) for live, segment in zip(lives, unit.segments)]
        self._rows = sorted(rows, key=lambda row: _is_planned(row[0]))
        """Each one's request and ordinal, as in the batch that was recorded: those with a plan are the last."""
        arena.take(self)

    def run(self) -> Generator[Stop, None, None]:
        arena = self._arena
        arena.fill(self._rows)
        ids = np.array([live.ids[t] for live, t in self._rows])
        arena.enter(self._model.embed(torch.from_numpy(ids)))
        num_layers = self._model.config.num_layers
        for end, tape in self._tapes:
            tape.run()
            if end == num_layers:
                self._leave(num_layers)
            yield Stop("layer", end - 1, "end")

    def _leave(self, num_layers: int) -> None:
        """All rows are through, and so are those of last tokens through the head."""
        arena = self._arena
        for i, ((live, t), row) in enumerate(zip(self._rows, arena.logits(len(self._rows)).unbind())):
            live.f = [t + 1] * num_layers
            live.kv.grow((0, num_layers), arena.lengths[:, i])
            live.kv.leave_behind(range(num_layers), t + 1)
            if t == live.num_known - 1 and not live.cancelled:
                self.logits[live.rid] = row
