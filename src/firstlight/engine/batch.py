"""The flat ragged batch of one pass: rows of all its members, one after the other, changing only at layers.

Prefill chunks, decode rows and packed prompts are the same rows. Members of one planner lie together, so that one
attention call serves them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.cache.table import Places
from firstlight.core.attn import Planner
from firstlight.core.parts import Cells, RequestRows
from firstlight.core.schedule import Segment
from firstlight.engine.live import LiveRequest
from firstlight.engine.rates import padded
from firstlight.kernels.contract import AttnCall, AttnRows
from firstlight.kernels.memory import Memory
from firstlight.kernels.tape import Own
from firstlight.models.decoder import Decoder


@dataclass(slots=True)
class Member:
    """One segment's rows: `x` [n, D] are views into the batch while they are in it."""

    live: LiveRequest
    segment: Segment
    tok: Tensor
    """i64 [n] ordinals, ascending."""
    pos: Tensor
    x: Tensor
    room: Tensor | None = None
    """What `x` begins, padded as a batch of these rows alone is; until they are in one."""
    visible: Tensor | None = None
    """Ordinals that this layer's pass may read; None = all."""
    loaded: Cells | None = None
    """What a source gave for this layer."""
    lo: int = 0
    places: Places | None = None
    """Where the rows' K/V go in the segment's layers; None = ask the table in each layer."""

    @property
    def hi(self) -> int:
        return self.lo + len(self.tok)

    @property
    def decode(self) -> bool:
        return self.segment.kind == "decode"

    @property
    def is_governed(self) -> bool:
        """Whether a row policy may touch the rows."""
        return self.live.is_governed(self.decode)

    @property
    def planner(self) -> Planner | None:
        """Who is asked what the rows read."""
        planner = self.live.planner
        return None if planner is None or (self.decode and planner.prompt_only) else planner

    @property
    def is_plain(self) -> bool:
        """No policy touches the rows, no source adds any, and all of them are written."""
        whole = not self.is_governed and self.live.spans is None
        return whole and self.segment.tok[0] >= self.live.held

    def find_places(self) -> None:
        """Ask the table once for all layers, where it can tell."""
        if self.places is None and self.is_plain:
            self.places = self.live.kv.places(self.segment.layer, self.tok, self.pos)

    def places_in(self, layer: int) -> Places | None:
        """Those of one layer, [1, ..]; None = the table has to sort it out."""
        if self.places is not None:
            return self.places.part(layer - self.segment.layer[0], 1)
        if self.is_plain:
            return self.live.kv.places((layer, layer + 1), self.tok, self.pos)
        if self.live.spans is not None or self.segment.tok[0] < self.live.held or not len(self.tok):
            return None
        self.live.kv.provide((layer, layer + 1), self.live.kv.beyond(layer, self.tok))
        return self.live.kv.open(layer, self.tok, self.pos)

    def count(self, layers: Iterable[int]) -> None:
        """The rows were computed in these layers."""
        n = len(self.tok)
        if self.decode:  # rows of the prompt may have come back
            n = int((self.tok < self.live.num_prompt).sum()) if self.is_governed else 0
        for layer in layers:
            self.live.computed[layer] += n

    @property
    def final(self) -> bool:
        """Whether the last prompt row is in this pass."""
        return self.decode or self.segment.tok[1] >= self.live.num_prompt

    def rows(self) -> RequestRows:
        return RequestRows(self.x, self.tok, self.pos)

    def select(self, mask: Tensor) -> None:
        """Only rows of bool [n] stay."""
        self.room = None
        self.tok, self.pos, self.x = self.tok[mask], self.pos[mask], self.x[mask]

    def insert(self, tok: Tensor, x: Tensor) -> None:
        """More rows, sorted in by ordinal."""
        self.room = None
        order = torch.argsort(torch.cat([self.tok, tok]))
        self.tok = torch.cat([self.tok, tok])[order]
        self.pos = torch.cat([self.pos, tok])[order]
        self.x = torch.cat([self.x, x])[order]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [lo, hi) of a batch, as row-local operators take them: views into it. cos, sin [RoPE bases, n, d]."""

    lo: int
    hi: int
    x: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Common:
    """What the layers that all members go through have of these, where that is known beforehand and lies in tables."""

    first: int
    slots: Tensor
    """i64 [L, N, Hkv]: where rows' K/V go."""
    ends: list[NDArray[np.int64]]
    """Of each member [L, Hkv]: entries that it holds with them."""
    views: NDArray[np.int64]
    """[L, B, ..]: what is read, as the kernel takes it."""
    tables: list[NDArray[np.int32]]
    """What `views` point to."""

    @cached_property
    def addresses(self) -> list[tuple[int, int]]:
        """Of each layer's part."""
        slots, step = self.slots.data_ptr(), self.slots.stride(0) * self.slots.itemsize
        views, other_step = self.views.ctypes.data, self.views.strides[0]
        return [(slots + at * step, views + at * other_step) for at in range(len(self.views))]


class Batch:
    """x [N, D] and what travels with each row. The buffer has a few zero rows more, so that blocks can be padded."""

    def __init__(self, members: list[Member], model: Decoder) -> None:
        self.members = sorted(members, key=_order)
        self.n = sum(len(m.tok) for m in members)
        self.governed = [m for m in self.members if m.is_governed]
        """Those whose rows a policy may touch."""
        keeps = [not m.decode and m.live.retention is not None for m in self.members]
        self.observed = [m for m, retained in zip(self.members, keeps) if m.is_governed or retained]
        """Those whose attention a part may ask for."""
        self.dtype, self._model = model.dtype, model
        self.layout = members[0].live.kv.pool.layout
        self.memory = Memory()
        """Lent to the operators of held layers."""
        self.noted: dict[Hashable, Any] = {}
        """By form, layers whose calls can be made again for others (`engine/held.py`)."""
        self.calls: dict[int, list[tuple[Sequence[Member], AttnCall]]] = {}
        """Attention of layers, and whose it is: what noted calls point to, as long as they may be made."""
        self._blocks: dict[int, list[Block]] = {}
        self._places: dict[int, tuple[Tensor, Iterable[Any]] | None] = {}
        """By layer, kept: noted calls point to them."""
        self._scratch: dict[str, Tensor] = {}
        for member in self.members:
            member.find_places()
        self._gather(model)
        plain = [m for m in self.members if m.planner is None]
        groups = ([plain] if plain else []) + [[m] for m in self.members if m.planner is not None]
        self.groups = [(members, self._rows(members)) for members in groups]
        """Members that one attention call serves, and its rows: all without a planner together, others alone."""

    def _gather(self, model: Decoder) -> None:
        """All rows, one member's after the other's; of one that comes alone none is moved."""
        room = self.members[0].room if len(self.members) == 1 else None
        self.x = torch.empty(padded(max(self.n, 1)), self.members[0].x.shape[1]) if room is None else room
        self.x[self.n :] = 0
        self.tok = chained([m.tok for m in self.members])
        self.pos = chained([m.pos for m in self.members])
        lo = 0
        for member in self.members:
            hi = lo + len(member.tok)
            if room is None:
                self.x[lo:hi] = member.x
            member.x, member.room, member.lo = self.x[lo:hi], None, lo
            lo = hi
        padding = [self.pos.new_zeros(len(self.x) - self.n)] if self.n < len(self.x) else []
        self.cos, self.sin = model.rope(chained([self.pos, *padding]))

    def blocks(self, step: int) -> list[Block]:
        """The rows in blocks of `step`; the last one reaches into the padding. Cut once for all layers."""
        if step not in self._blocks:
            ends = [(lo, min(lo + step, lo + padded(self.n - lo))) for lo in range(0, max(self.n, 1), step)]
            tables = [(self.cos[:, lo:hi], self.sin[:, lo:hi]) for lo, hi in ends]
            self._blocks[step] = [Block(lo, hi, self.x[lo:hi], *table) for (lo, hi), table in zip(ends, tables)]
        return self._blocks[step]

    def scratch(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor [N padded, *shape], zero behind N, kept as long as the batch: fresh memory costs page faults."""
        if name not in self._scratch:
            self._scratch[name] = torch.empty(len(self.x), *shape, dtype=self.dtype)
            self._scratch[name][self.n :] = 0
        return self._scratch[name]

    def head(self, model: Decoder) -> Tensor:
        """Logits of all rows, f32 [N, V]."""
        return model.head(self.x[: self.n])

    def recording(self, layer: int) -> AbstractContextManager[None]:
        """Around a layer: have it recorded, if it can be."""
        return nullcontext()

    @property
    def is_plain(self) -> bool:
        """No part looks at any row inside the layers."""
        return not any((m.is_governed and m.live.acts_inside) or m.planner is not None for m in self.members)

    @property
    def is_foreseen(self) -> bool:
        """No part looks at any row at the layers' ends either, and it is known where K/V go in all of them."""
        return not self.observed and all(m.places is not None for m in self.members)

    def numbers(self, layer: int, members: Sequence[Member]) -> Any:
        """What `AttnCall.numbers` takes, for members that one call serves."""
        return (self._common.views[layer - self._common.first], None, None) if self.is_common else None

    @cached_property
    def is_common(self) -> bool:
        """Whether all that layers have of the members' own are places: of K/V, of tables."""
        return (
            self._model.can_hold
            and self.is_plain
            and self.is_foreseen
            and all(m.live.kv.is_identity for m in self.members)
        )

    def own(self, layer: int, pace: Hashable) -> Own:
        """What calls have of a layer's own, of the model's and of the members'; `pace`: what they are cut by."""
        form, addresses = self._model.own[layer]
        return Own((form, pace), (*addresses, *self._common.addresses[layer - self._common.first]))

    @cached_property
    def _common(self) -> Common:
        begin = max(m.segment.layer[0] for m in self.members)
        end = min(m.segment.layer[1] for m in self.members)
        shared = [m.places.part(begin - m.segment.layer[0], end - begin) for m in self.members if m.places is not None]
        slots = chained([places.slots for places in shared], 1)
        ends, kvs = [places.ends for places in shared], [m.live.kv for m in self.members]
        views, tables = [kv.view(begin) for kv in kvs], [kv.table for kv in kvs]
        lengths = [np.maximum(kv.length[begin:end], more) for kv, more in zip(kvs, ends)]
        numbers = self._model.ops.layer_numbers(views, [table.strides[0] for table in tables], lengths)
        return Common(begin, slots, ends, numbers, tables)

    def repeated(self, layers: Sequence[int]) -> None:
        """These layers' calls were noted as another one's: requests' books say what was written there."""
        common, first, end = self._common, layers[0], layers[-1] + 1
        for m, ends in zip(self.members, common.ends):
            m.count(layers)
            m.live.kv.grow((first, end), ends[first - common.first : end - common.first])

    def places(self, layer: int) -> tuple[Tensor, Iterable[Any]] | None:
        """Where all rows' K/V go in a layer, i64 [N, Hkv], and each member's `ends`; None = ask tables one by one."""
        if layer not in self._places and self.is_common:
            at, common = layer - self._common.first, self._common
            self._places[layer] = common.slots[at], [ends[at : at + 1] for ends in common.ends]
        elif layer not in self._places:
            found = [places for m in self.members if (places := m.places_in(layer)) is not None]
            self._places[layer] = None
            if len(found) == len(self.members):
                slots = chained([places.slots[0] for places in found])
                self._places[layer] = slots, [places.ends for places in found]
        return self._places[layer]

    def _rows(self, members: Sequence[Member]) -> AttnRows:
        lo, hi = members[0].lo, members[-1].hi
        first = [m.lo - lo for m in members] + [hi - lo]
        return AttnRows(first, self.tok[lo:hi], self.pos[lo:hi], [m.decode for m in members])


def count_read(members: Sequence[Member], call: AttnCall, layers: int = 1) -> None:
    """Density is reported for prompts, over the triangle of all their tokens, those without a row included.

    Noted calls have counted nothing: they have no plan, so what is there says what is read.
    """
    heads = call.q.shape[1]
    for i, m in enumerate(members):
        if not m.decode:
            first, end = m.segment.tok
            m.live.stats.dense += layers * ((first + 1 + end) * (end - first) // 2 * heads)
            read = call.stats.visible if len(members) == 1 else 0
            m.live.stats.visible += layers * (read or call.num_read(i) * heads)


def chained(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One after the other; of one alone no copy is made."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _order(member: Member) -> tuple[bool, bool]:
    """Those without a planner first; prefill rows before decode rows."""
    return (member.planner is not None, member.decode)
