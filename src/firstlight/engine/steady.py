"""Decode passes that are alike from step to step: their layers are recorded once and replayed.

Between two decode steps of the same number of plain rows nothing changes but numbers in memory: where K/V go, how long
views are, what rows hold. So these lie in an `Arena` that stays, each pass writes them there for all layers at once,
and a layer's calls (kernels/tape.py) are run again. Whatever isn't plain goes the ordinary way, and so does the first
pass of its kind, while it is recorded.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.engine.batch import Batch, Block, Member
from firstlight.engine.rates import padded
from firstlight.kernels.contract import AttnRows
from firstlight.kernels.tape import Memory, Tape, recording
from firstlight.models.decoder import Decoder


class Steady:
    """The arenas of one machine, by padded row count."""

    def __init__(self, model: Decoder, ops: ModuleType) -> None:
        self._model, self._ops = model, ops
        self._arenas: dict[int, Arena] = {}
        self.most = 64 if hasattr(ops, "view_numbers") else 0
        """Rows of a pass that is recorded."""

    def batch(self, members: Sequence[Member]) -> Batch | None:
        """The members' rows in an arena; None if they aren't all plain decode rows, or another pass has it."""
        if not 0 < len(members) <= self.most or not all(self._is_steady(m) for m in members):
            return None
        size = padded(len(members))
        if size not in self._arenas:
            self._arenas[size] = Arena(size, self._model, self._ops, members[0])
        arena = self._arenas[size]
        return None if arena.is_taken else SteadyBatch(arena, list(members), self._model)

    def _is_steady(self, m: Member) -> bool:
        """One row for all layers up to the last, whose place is known and on which no part has a say."""
        live, last = m.live, m.segment.layer[1] == len(m.live.f)
        if not (m.decode and m.is_plain and len(m.tok) == 1 and last and live.kv.windows is None):
            return False
        if m.planner is not None or live.retention is not None:
            return False
        m.find_slots()
        return m.slots is not None


class Arena:
    """Buffers for `size` rows, and the tapes of passes over them.

    A pass has it as long as its batch lives.
    """

    def __init__(self, size: int, model: Decoder, ops: ModuleType, member: Member) -> None:
        c = model.config
        self._model, self._ops = model, ops
        self.x = torch.zeros(size, member.x.shape[1])
        self.tok = torch.zeros(size, dtype=torch.int64)
        """Ordinals, and positions: all rows are as they were made."""
        self.cos, self.sin = (t.contiguous() for t in model.rope(self.tok))
        self.attended = torch.zeros(size, c.num_heads, c.head_dim, dtype=model.dtype)
        self.blocks = [Block(0, size, self.x, self.cos, self.sin)]
        self.slots = torch.zeros(c.num_layers, size, c.num_kv_heads, dtype=torch.int64)
        seen = np.zeros((c.num_layers, size, ops.view_numbers([member.live.kv.view(0)]).shape[1]), np.int64)
        self.views = list(seen)
        """Of each layer, for all rows: i64 [size, ..]."""
        self._ends = seen[:, :, -c.num_kv_heads :]
        self.memory = Memory()
        self.tapes: dict[tuple[int, int, int, int], Tape] = {}
        """By layers [first, end), rows and threads."""
        self._rows: dict[int, AttnRows] = {}
        self._tables: list[Any] = [None] * size
        self._batch: weakref.ref[Batch] | None = None

    @property
    def is_taken(self) -> bool:
        return self._batch is not None and self._batch() is not None

    def fill(self, batch: Batch) -> None:
        """The numbers of a pass that begins, or that some have left."""
        self._batch, members, n = weakref.ref(batch), batch.members, batch.n
        x = torch.cat([m.x for m in members])  # a copy: they may be views of the arena
        self.x[:n], self.x[n:] = x, 0.0
        self.tok[n:] = 0
        self.tok.numpy()[:n] = [m.segment.tok[0] for m in members]
        for into, table in zip((self.cos, self.sin), self._model.rope(self.tok)):
            into.copy_(table)
        for i, m in enumerate(members):
            assert m.slots is not None
            m.lo, m.x = i, self.x[i : i + 1]
            self.slots[m.segment.layer[0] :, i : i + 1] = m.slots
            self._look(i, m)
            self._ends[:, i] = m.segment.tok[1]

    def rows(self, n: int) -> AttnRows:
        """The first n rows, one a request. Recorded calls point to what a backend keeps in its memo."""
        if n not in self._rows:
            self._rows[n] = AttnRows(range(n + 1), self.tok[:n], self.tok[:n], [True] * n)
        return self._rows[n]

    def _look(self, i: int, m: Member) -> None:
        """Row i reads m's table: it lies where it lay until it grows."""
        kv = m.live.kv
        if self._tables[i] is not kv.table:
            self._tables[i] = kv.table
            for numbers, row in zip(self.views, self._ops.view_numbers([kv.view(n) for n in range(len(self.views))])):
                numbers[i] = row


class SteadyBatch(Batch):
    """A batch in an arena."""

    def __init__(self, arena: Arena, members: list[Member], model: Decoder) -> None:
        self._arena = arena
        super().__init__(members, model)

    def _gather(self, model: Decoder) -> None:
        arena = self._arena
        arena.fill(self)
        self.x, self.cos, self.sin = arena.x, arena.cos, arena.sin
        self.tok = self.pos = arena.tok[: self.n]
        self._scratch["attended"] = arena.attended

    def replay(self, layer: int, end: int) -> int:
        tape = self._tape(layer, end) or self._tape(layer, end := layer + 1)
        if tape is None:
            return layer
        tape.run()
        for m in self.members:
            m.live.kv.grow((layer, end), m.segment.tok[1])
        return end

    @contextlib.contextmanager
    def recording(self, layer: int) -> Iterator[None]:
        key = self._key(layer, layer + 1)
        if key in self._arena.tapes:  # it can't be replayed
            yield
            return
        with recording(self._arena.memory) as tape:
            yield
        self._arena.tapes[key] = tape

    def _key(self, layer: int, end: int) -> tuple[int, int, int, int]:
        return layer, end, self.n, torch.get_num_threads()

    def _tape(self, layer: int, end: int) -> Tape | None:
        """Of these layers, joined from theirs when first asked for; None if one of them can't be replayed."""
        tapes, key = self._arena.tapes, self._key(layer, end)
        if key not in tapes:
            parts = [tapes.get(self._key(n, n + 1)) for n in range(layer, end)]
            whole = [part for part in parts if part is not None and part.is_whole]
            if len(whole) < end - layer:
                return None
            tapes[key] = Tape()
            for part in whole:
                tapes[key].extend(part)
        return tapes[key] if tapes[key].is_whole else None

    def blocks(self, step: int) -> list[Block]:
        return self._arena.blocks

    def slots(self, layer: int) -> Tensor | None:
        return self._arena.slots[layer, : self.n]

    def view_numbers(self, layer: int) -> Any:
        return self._arena.views[layer][: self.n]

    def _rows(self, members: Sequence[Member]) -> AttnRows:
        return self._arena.rows(self.n)
