"""One pass over the layers as a resumable object: the loop that every schedule and every method shares.

`Pass.run` is a generator. Between two of its stops lies at most a slice of predicted work, its locals are the unit's
scratch, closing it is a cancellation. For each layer: rows join (embedding, or the park store) and before_layer; q k v
and rotation; on_kv and the upsert; attention with probe sums; after_attend; output projection and MLP; cuts, barriers
and retention; rows leave (park store, or the head).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.core.parts import Keep, Merge
from firstlight.core.schedule import Segment, WorkUnit
from firstlight.engine.batch import Batch, Member, chained, count_read
from firstlight.engine.cuts import RowCuts
from firstlight.engine.held import Held
from firstlight.engine.live import LiveRequest
from firstlight.engine.machine import Machine
from firstlight.engine.probes import Probes
from firstlight.engine.rates import attend_work, padded, slices
from firstlight.engine.spans import joined
from firstlight.engine.work import Stop, Work
from firstlight.kernels.contract import AttnCall, AttnRows

_HEAD_ROWS = 256
"""Rows of prompt logits made at a time."""


def begin(machine: Machine, unit: WorkUnit, lives: Sequence[LiveRequest]) -> Work:
    """A unit's pass: a replay where that may be."""
    return machine.steady.replay(unit, lives, partial(machine.stride, unit)) or Pass(machine, unit, lives)


class Pass(Work):
    """A work unit that is computed layer by layer."""

    def __init__(self, machine: Machine, unit: WorkUnit, lives: Sequence[LiveRequest]) -> None:
        super().__init__(unit, lives)
        self.machine = machine
        self._row_cuts = RowCuts(machine.park, self.cuts)
        self._segments: list[tuple[LiveRequest, Segment]] = []
        self._members: list[Member] = []
        self._batch: Batch | None = None
        self._governed = any(live.is_governed(s.kind == "decode") for live, s in zip(lives, unit.segments))
        self._sourced = any(live.spans for live in self.lives)
        self._fine = True
        """Whether to stop inside layers."""
        self._probes: Probes | None = None

    def run(self) -> Generator[Stop, None, None]:
        for segments in self._rounds():
            self._segments = segments
            yield from self._through()

    def _rounds(self) -> Iterator[list[tuple[LiveRequest, Segment]]]:
        """What goes through the layers at once: all segments, but that rows replayed under row policies go one by one.

        What such a row leaves undone, the next one may want.
        """
        alone = [
            (live, replace(segment, tok=(t, t + 1)))
            for live, segment in zip(self.lives, self.unit.segments)
            if segment.kind == "decode" and live.is_governed(decode=True)
            for t in range(*segment.tok)
        ]
        first = {live.rid: (live, segment) for live, segment in reversed(alone)}
        yield [first.get(live.rid, (live, segment)) for live, segment in zip(self.lives, self.unit.segments)]
        yield from ([row] for row in alone if row not in first.values())

    def _through(self) -> Iterator[Stop]:
        begin, end = ({segment.layer[side] for _, segment in self._segments} for side in (0, 1))
        layer = min(begin)
        while layer < max(end):
            if layer in begin or any(live.cancelled for live in self.lives):
                self._join(layer)
                yield Stop("slice", layer, "join")
            first, layer = layer, layer + 1
            if self._members:
                alike = min(other for other in begin | end if other > first)
                layer = yield from self._layers(first, alike)
                if layer in end:
                    yield from self._leave(layer)
            yield Stop("layer", layer - 1, "end")

    # --- rows come and go ---------------------------------------------------------------------------------------------

    def _join(self, layer: int) -> None:
        """Rows of segments that begin here; those of cancelled requests leave."""
        fresh = [
            self._enter(live, segment, layer)
            for live, segment in self._segments
            if segment.layer[0] == layer and not live.cancelled
        ]
        stay = [m for m in self._members if not m.live.cancelled]
        if fresh or len(stay) < len(self._members):
            self._members, self._batch = stay + fresh, None

    def _enter(self, live: LiveRequest, segment: Segment, layer: int) -> Member:
        if layer > 0:  # rows revived below the segment came to this stair with it
            waiting = self.machine.park.ordinals(live.rid, layer, "waiting")
            tok, x = self.machine.park.take(live.rid, layer, waiting[waiting < segment.tok[1]], "waiting")
            return Member(live, segment, tok, tok, x if len(tok) else self.machine.model.embed(tok))
        tok = torch.arange(*segment.tok)
        if live.spans is not None:
            tok = tok[~live.spans.spared(tok) | (tok == live.num_prompt - 1)]
        for policy, context in zip(live.policies, live.contexts) if live.is_governed(segment.kind == "decode") else ():
            mask = policy.rows0(tok, context)
            tok = tok if mask is None else tok[mask | (tok == live.num_prompt - 1)]
        ids, n = np.array(live.ids[segment.tok[0] : segment.tok[1]]), len(tok)
        wanted = np.zeros(padded(n), np.int64)
        wanted[:n] = ids if n == len(ids) else ids[tok.numpy() - segment.tok[0]]
        room = self.machine.model.embed(torch.from_numpy(wanted))
        return Member(live, segment, tok, tok, room[:n], room)

    def _leave(self, layer: int) -> Iterator[Stop]:
        """Segments that end before `layer`: rows wait there, or go through the head."""
        done = [m for m in self._members if m.segment.layer[1] == layer]
        self._predict([m for m in done if layer == len(m.live.f)])
        for member in done:
            live, (first, end) = member.live, member.segment.layer
            live.f[first:end] = [member.segment.tok[1]] * (end - first)
            if layer < len(live.f):
                self.machine.park.put(live.rid, layer, member.tok, member.x, "waiting")
                self._row_cuts.at_barrier(live, layer - 1, None)
            else:
                if member.final:
                    live.seen.clear()
                yield from self._head(member)
        if done:
            self._members = [m for m in self._members if m not in done]
            if self._members:  # without any the batch stays, since logits may lie in its memory
                self._batch = None

    def _predict(self, done: Sequence[Member]) -> None:
        """Logits of each one's last known row, for sampling: the head's weights are read once for all of them."""
        sampled = [m for m in done if len(m.tok) and not m.live.cancelled]
        last = [m for m in sampled if int(m.tok[-1]) == m.live.num_known - 1]
        batch, model = self._batch, self.machine.model
        if batch is not None and len(last) == batch.n:  # all of its rows, as they lie
            logits = batch.head(model)
            self.logits |= {m.live.rid: logits[m.lo] for m in last}
        elif last:
            logits = model.head(chained([m.x[-1:] for m in last]))
            self.logits |= {m.live.rid: logits[row] for row, m in enumerate(last)}

    def _head(self, member: Member) -> Iterator[Stop]:
        """Logits of the rows asked for, in row blocks."""
        live, model = member.live, self.machine.model
        request = live.request
        if live.cancelled or request.logits_at is None or request.logits_sink is None:
            return
        wanted = member.tok < live.num_prompt
        if request.logits_at != "all":
            wanted &= torch.isin(member.tok, torch.tensor(list(request.logits_at)))
        tok, x = member.tok[wanted], member.x[wanted]
        for a in range(0, len(tok), _HEAD_ROWS):
            request.logits_sink(tok[a : a + _HEAD_ROWS], model.head(x[a : a + _HEAD_ROWS]))
            yield Stop("slice", len(live.f), "head")

    # --- layers -------------------------------------------------------------------------------------------------------

    def _layers(self, layer: int, alike: int) -> Generator[Stop, None, int]:
        """One layer, or more up to `alike`, before which no row comes or goes; returns the next one."""
        if self._sourced:
            self._load(layer)
        aside = self._before(layer) if self._governed else []
        batch = self._batch or self._gather()
        if self._holds(layer, batch):
            waits = self.unit.yield_at != "none"
            own = partial(batch.own, pace=self.machine.pace) if batch.is_common else None
            held = Held(batch, range(layer, alike), waits, lambda layer: self._compute(layer, batch), own)
            for noted, others in held.repeated.items():
                batch.repeated(others)
                for members, call in batch.calls[noted]:
                    count_read(members, call, len(others))
            for passed in held.stretches(self.machine.bell):
                self.machine.observe(passed)
                yield passed[-1][0]
            self._end(range(layer, held.end), aside)
            return held.end
        with batch.recording(layer):
            before = time.perf_counter()
            for stop in self._compute(layer, batch):
                self.machine.observe([(stop, time.perf_counter() - before)])
                if self._fine:
                    yield stop
                before = time.perf_counter()
        self._end(range(layer, layer + 1), aside)
        return layer + 1

    def _holds(self, layer: int, batch: Batch) -> bool:
        """Whether nothing but kernels touches memory in a layer: no part looks at rows, and all places are known."""
        holds = self.machine.holds and self.machine.model.can_hold
        return holds and batch.is_plain and batch.places(layer) is not None

    def _gather(self) -> Batch:
        """The members' rows as a batch, and whether to stop inside its layers; a steady one, if that may be."""
        machine, members = self.machine, self._members
        rows = sum(len(m.tok) for m in members)
        pairs = sum(len(m.tok) * sum(m.segment.tok) // 2 for m in members) + rows
        self._fine = machine.stride(self.unit, rows, pairs) == 0
        steady = None if self._fine else machine.steady.batch(members)
        self._batch = steady or Batch(members, machine.model)
        return self._batch

    def _end(self, layers: range, aside: Sequence[tuple[Member, Tensor, Tensor]]) -> None:
        """These layers' kernels have run: cuts take effect, barriers and retention decide, windows move on."""
        assert self._batch is not None
        batch = self._batch
        if not batch.is_common:
            batch.calls.clear()
        for m in batch.members:
            m.live.kv.leave_behind(layers, m.segment.tok[1])
        layer = layers[-1]
        for m in batch.observed:
            if self._row_cuts.apply(m, layer):
                self._batch = None
            if m.live.retention is not None and m.final and not m.decode:
                self._retain(layer, m, self._probes.obs(m) if self._probes else None)
        for m, tok, x in aside:
            m.insert(tok, x)
            self._batch = None
        for m in batch.governed:
            if m.segment.layer[1] > layer + 1 and self._row_cuts.at_barrier(m.live, layer, m):
                self._batch = None

    def _compute(self, layer: int, batch: Batch) -> Iterator[Stop]:
        q, k, v = yield from self._qkv(layer, batch)
        for m in batch.governed:
            self._row_cuts.on_kv(m, layer, k[m.lo : m.hi], v[m.lo : m.hi])
        self._write(layer, batch, k, v)
        attended = batch.scratch("attended", q.shape[1:])
        self._probes = probes = Probes(layer, batch.observed) if batch.observed else None
        yield from self._attend(layer, batch, q, attended, probes)
        for m in batch.governed:
            self._row_cuts.after_attend(m, layer, probes.obs(m) if probes else None)
        yield Stop("sublayer", layer, "attend")
        batch, attended = self._early(layer, batch, attended)
        yield from self._finish(layer, batch, attended)
        yield Stop("sublayer", layer, "mlp")

    def _load(self, layer: int) -> None:
        """What sources have for the layer: cells, and rows that can be revived."""
        for m in self._members:
            if m.live.spans is not None and not m.decode:
                first, end = m.segment.tok
                m.loaded = m.live.spans.load(self.machine.model, layer, max(first, m.live.held), end)
                for tok, x in m.live.spans.hidden(layer, first, end):
                    idle = ~torch.isin(tok, m.tok)
                    self.machine.park.put(m.live.rid, layer, tok[idle], x[idle], "cut")

    def _early(self, layer: int, batch: Batch, attended: Tensor) -> tuple[Batch, Tensor]:
        """Rows that need not go through the MLP leave, and what attention gave them."""
        gone = {i: rows for i, m in enumerate(batch.governed) if (rows := self._row_cuts.leaving(m, layer)) is not None}
        if not gone:
            return batch, attended
        stays = torch.ones(batch.n, dtype=torch.bool)
        for i, rows in gone.items():
            stays[batch.governed[i].lo : batch.governed[i].hi] = ~rows
        for m in batch.members:
            m.select(stays[m.lo : m.hi])
        self._batch = fresh = Batch(self._members, self.machine.model)
        left = fresh.scratch("attended", attended.shape[1:])
        left[: fresh.n] = attended[: batch.n][stays]
        return fresh, left

    def _before(self, layer: int) -> list[tuple[Member, Tensor, Tensor]]:
        """Row policies as rows enter: revived rows come in, skipping rows are set aside for this layer."""
        aside: list[tuple[Member, Tensor, Tensor]] = []
        for member in self._members:
            if not member.is_governed:
                continue
            entered = self._row_cuts.before_layer(member, layer)
            if entered is not None:
                self._batch = None
                aside += [(member, *entered)] if len(entered[0]) else []
        return aside

    def _qkv(self, layer: int, batch: Batch) -> Generator[Stop, None, Sequence[Tensor]]:
        """q [N, Hq, d], k, v [N, Hkv, d] of all rows, padding included."""
        model, c = self.machine.model, self.machine.model.config
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        blocks = batch.blocks(self.machine.linear.rows(model.qkv_flops))
        whole = batch.scratch("qkv", (sum(heads) * c.head_dim,)) if len(blocks) > 1 else None
        for block in blocks:
            room = None if whole is None else whole[block.lo : block.hi]
            batch.memory.begin()
            made: Sequence[Tensor] = model.qkv(layer, block.x, block.cos, block.sin, room)
            yield Stop("slice", layer, "qkv", model.qkv_flops * (block.hi - block.lo))
        yield Stop("op", layer, "qkv")
        return made if whole is None else whole.view(len(whole), -1, c.head_dim).split_with_sizes(heads, 1)

    def _write(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        """Upsert the cells of all rows, but for those that were exact before."""
        for m in batch.members:
            m.count([layer])
        if (places := batch.places(layer)) is not None:
            slots, ends = places
            batch.layout.write(slots, k, v)
            for m, end in zip(batch.members, ends):
                m.live.kv.grow((layer, layer + 1), end)
            return
        for m in batch.members:
            self._upsert(layer, m, k[m.lo : m.hi], v[m.lo : m.hi])

    def _upsert(self, layer: int, m: Member, k: Tensor, v: Tensor) -> None:
        """One member's cells: among others, between others, or copied on write."""
        live = m.live
        new = int((m.tok < live.held).sum()) if live.held else 0
        tok, k, v = m.tok[new:], k[new:], v[new:]
        if m.loaded is not None:
            cells = joined(tok, k, v, m.loaded)
            live.reused += len(cells.tok) - len(tok)
            tok, k, v = cells.tok, cells.k, cells.v
        if m.is_governed:
            live.kv.provide((layer, layer + 1), live.kv.beyond(layer, tok))
        live.kv.write(layer, tok, tok if m.loaded is not None else m.pos[new:], k, v)

    def _attend(self, layer: int, batch: Batch, q: Tensor, out: Tensor, probes: Probes | None) -> Iterator[Stop]:
        ops, rate = self.machine.ops, self.machine.attention
        for members, rows in batch.groups:
            call = self._call(layer, members, rows, q, out, probes, batch.numbers(layer, members))
            batch.calls.setdefault(layer, []).append((members, call))
            end = rows.row_ptr[-1]
            if not self._fine:
                ops.attend(call, 0, end)
            for r0, r1, work in slices(attend_work(call, ops.attend_cuts(call, 0, end)), rate) if self._fine else ():
                ops.attend(call, r0, r1)
                yield Stop("slice", layer, "attend", work)
            count_read(members, call)

    def _call(
        self,
        layer: int,
        members: Sequence[Member],
        rows: AttnRows,
        q: Tensor,
        out: Tensor,
        probes: Probes | None,
        numbers: Any,
    ) -> AttnCall:
        """The attention call of members that lie together in the batch."""
        model, only, lo = self.machine.model, members[0], members[0].lo
        probe = probes.rows(members) if probes else None
        probed = None if probe is None or probe.colsum[0] is None else probe.first_tok[0]
        written = numbers is not None and only.planner is not None  # a steady row's plan lies among its numbers
        plan = None if written else self.machine.planning.plan(model, layer, only, q, probed)
        return AttnCall(
            q=q[lo:] if lo else q,
            rows=rows,
            layout=only.live.kv.pool.layout,
            kv=[m.live.kv.view(layer, m.visible) for m in members],
            out=out[lo:] if lo else out,
            scale=model.scale,
            score_cap=model.config.score_cap,
            plan=plan,
            model_window=model.windows[layer],
            probe=probe,
            numbers=numbers,
        )

    def _finish(self, layer: int, batch: Batch, attended: Tensor) -> Iterator[Stop]:
        model = self.machine.model
        flops = model.layer_flops - model.qkv_flops
        for block in batch.blocks(self.machine.linear.rows(flops)):
            batch.memory.begin()
            model.finish(layer, block.x, attended[block.lo : block.hi])
            yield Stop("slice", layer, "mlp", flops * (block.hi - block.lo))

    def _retain(self, layer: int, m: Member, obs: Any) -> None:
        live = m.live
        assert live.retention is not None
        ctx = live.retention_context
        ctx.final = True
        tok, length = live.kv.ordinals(layer), live.kv.length[layer].tolist()
        ctx.entries = partial(live.kv.entries, layer)
        match live.retention.after_layer(layer, tok, length, obs, ctx):
            case Keep(idx):
                live.kv.keep(layer, idx)
            case Merge(assign, mode):
                live.kv.merge(layer, assign, mode)
