"""The engine's loop: events in, a plan from the policy, units to the executor, tokens out.

A request's states, as the policy's view has them (`core/view.py`):

    add -> waiting -> admitting -> running -> finished
                ^                    |  cancel, at any moment -> cancelled -> gone
                +---- preempted <----+

The loop decides nothing about order: whatever runs was in a plan, whatever a policy knows was in an event.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch

from firstlight.cache.pool import Ids, Pool
from firstlight.cache.table import blocks_for
from firstlight.core import schedule as told
from firstlight.core.errors import UserError
from firstlight.core.registry import Part
from firstlight.core.request import Known, Request, TokenOutput
from firstlight.core.schedule import Event, Plan, Policy, WorkUnit, legal
from firstlight.core.view import View, ViewConfig
from firstlight.decode.sampling import sample
from firstlight.engine.admission import Admission, Limits
from firstlight.engine.cuts import CutTaken
from firstlight.engine.eventlog import EventLog
from firstlight.engine.forward import begin
from firstlight.engine.guard import PartFailed
from firstlight.engine.live import LiveRequest
from firstlight.engine.machine import Machine
from firstlight.engine.work import Stop, Work
from firstlight.kernels.threads import bound
from firstlight.reuse.prefix import PrefixCache

log = logging.getLogger(__name__)

_LEVELS = ("slice", "op", "sublayer", "layer")


@dataclass(slots=True)
class LiveUnit:
    """A unit that was submitted: its pass, and where the pass stands."""

    unit: WorkUnit
    work: Work
    stops: Generator[Stop, None, None]
    began: float = 0.0
    stop_wanted: bool = False


class Engine:
    """One lane. `add` and `cancel` may be called from any thread; `step` from one."""

    def __init__(
        self,
        machine: Machine,
        pool: Pool,
        policy: Policy,
        config: ViewConfig,
        limits: Limits,
        parts: Sequence[Part] = (),
        cache: PrefixCache | None = None,
        log: EventLog | None = None,
    ) -> None:
        self.machine, self.pool, self.policy, self.config, self.limits = machine, pool, policy, config, limits
        self.parts, self.cache, self.log = list(parts), cache, log
        self.view = View.start(config)
        self.on_stop: Callable[[Work, Stop], None] | None = None
        """Called at every stop that a pass makes: progress."""
        self.patience_s = 0.0
        """How long a pass may go on without a stop if nobody comes and no alarm goes off; at 0 it makes all of them."""
        self.num_fallbacks = 0
        """Requests that went on dense because a method raised."""
        self.overhead_s = 0.0
        """Time spent deciding, not computing."""
        self._origin = time.perf_counter()
        self._inbox: deque[Event] = deque()
        self._held: dict[str, told.Arrival] = {}
        """Requests that wait for the prompt of another; the policy doesn't know them yet."""
        self._lives: dict[str, LiveRequest] = {}
        self._queue: deque[LiveUnit] = deque()
        self._yielded: dict[int, LiveUnit] = {}
        self._running: LiveUnit | None = None
        self._wake_at: float | None = None
        self._outputs: list[TokenOutput] = []
        self.admission = Admission(pool, config, limits, parts, cache)

    # --- what callers use ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: requests are under way, or outputs of a failed pass wait."""
        return bool(self._lives or self._outputs)

    def add(self, request: Request) -> LiveRequest:
        """Queue a request. Raises UserError if it can never run."""
        assert request.rid not in self._lives, f"a request {request.rid!r} is under way"
        live = self.admission.open(request)
        self._lives[request.rid] = live
        try:
            self.admission.check_room(live)
            if request.known is not None:
                self.admission.pins.retain(request.known)
        except UserError:
            del self._lives[request.rid]
            raise
        self._held[live.rid] = self.admission.arrival(live)
        leader = self._lives.get(request.after or "")
        if self.cache is None or leader is None or leader.stamps.prefilled:
            self._enter(live.rid)
        return live

    def is_live(self, rid: str) -> bool:
        """Whether anything of a request is left."""
        return rid in self._lives

    def cancel(self, rid: str) -> None:
        """Stop a request: at the next slice if its unit is its own; unknown or finished ones are ignored."""
        if rid in self._lives:
            self._enter(rid)
            self._hear(told.Cancel(rid))

    def nudge(self) -> None:
        """Have the policy decide at the next stop, though nothing happened."""
        self._hear(told.Timer())

    def load(self, held: Ids, num_tokens: int, fill: Callable[[Ids], None]) -> Known:
        """A document's cells from elsewhere, as `Admission.load` says; by the thread of `step`, between steps."""
        known = self.admission.load(held, num_tokens, fill, list(self._lives.values()))
        self._inbox.append(told.Pinned(**self._account()))
        return known

    def step(self) -> list[TokenOutput]:
        """Decide if there is something new, then run one unit until it ends or is told to wait. Returns new tokens."""
        if events := self._drain():
            self._decide(events)
        if self._queue:
            with bound():
                self._run(self._queue.popleft())
        elif not events and not self._inbox and self.view.requests:
            self._sleep()
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Drop everything: passes, requests, cached columns; ends the log."""
        for live_unit in (*self._queue, *self._yielded.values()):
            live_unit.stops.close()
        for live in list(self._lives.values()):
            self._forget(live)
        self.admission.pins.clear()
        if self.cache is not None:
            self.cache.clear()
        if self.log is not None:
            self.log.end()
            self.log = None

    # --- deciding -----------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.perf_counter() - self._origin

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        while self._inbox:
            event = self._inbox.popleft()
            events.append(event)
            if isinstance(event, told.Cancel):
                self._cancel(event.rid)
        if self.admission.pins.sweep():  # last, since what it tells is the state of now
            events.append(told.Pinned(**self._account()))
        if self._wake_at is not None and self._now() >= self._wake_at:
            self._wake_at = None
            events.append(told.Timer())
        return events

    def _decide(self, events: list[Event]) -> None:
        began = time.perf_counter()
        now = self._now()
        try:
            view = self.view.after(now, events)
            plan = self.policy.step(now, events, view)
            self.view = view.after_plan(plan)
        except BaseException:
            self._inbox.extendleft(reversed(events))  # nothing was decided: they are still news
            raise
        if self.log is not None:
            self.log.step(now, events, plan)
        self._apply(plan)
        self.overhead_s += time.perf_counter() - began

    def _apply(self, plan: Plan) -> None:
        self._wake_at = plan.wake_at
        for rid, how in plan.preempt:
            self._preempt(self._lives[rid], how)
        for rid in plan.admit:
            self._admit(self._lives[rid])
        for uid in plan.yield_:
            if self._running is not None and self._running.unit.uid == uid:
                self._running.stop_wanted = True
        for uid in plan.resume:
            self._queue.append(self._yielded.pop(uid))
        for unit in plan.submit:
            self._submit(unit)

    def _sleep(self) -> None:
        """Nothing to do before the policy's alarm. Without one, a policy has forgotten somebody."""
        assert self._wake_at is not None, f"the policy left {sorted(self.view.requests)} without work"
        time.sleep(max(0.0, min(self._wake_at - self._now(), 0.05)))

    def _account(self) -> dict[str, Any]:
        return {"free_blocks": self.pool.available, "parked_bytes": self.machine.park.nbytes}

    def _enter(self, rid: str) -> None:
        """A request arrives, if it hasn't yet. From any thread."""
        if (arrival := self._held.pop(rid, None)) is not None:
            self._hear(arrival)

    def _hear(self, event: Event) -> None:
        """News, from any thread: the pass that runs stops for it."""
        self._inbox.append(event)
        self.machine.bell.ring()

    def _look(self) -> bool:
        """Whether there is something to decide, and when the pass that runs has to stop next."""
        now = self._now()
        alarm = inf if self._wake_at is None else self._wake_at - now
        hurried = self._running is not None and self._running.stop_wanted
        self.machine.bell.after(0.0 if hurried else min(alarm, self.patience_s))
        if news := bool(self._inbox) or alarm <= 0:  # asked after that, since other threads' news may have rung before
            self.machine.bell.ring()
        return news

    def _enter_after(self, leader: str) -> None:
        """Whoever waited for a prompt arrives."""
        for rid in [rid for rid in list(self._held) if self._lives[rid].request.after == leader]:
            self._enter(rid)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _admit(self, live: LiveRequest) -> None:
        """A parked request comes back as it was; another one is admitted, or the policy is told that it wasn't."""
        try:
            admitted = max(live.f) > 0 or self.admission.admit(live)
        except PartFailed as failure:
            self._restart(live, failure)
            return
        if admitted:
            self._inbox.append(told.Admitted(rid=live.rid, n_cached=live.n_cached, **self._account()))
            return
        need = self.admission.need(live)
        self._inbox.append(told.NotAdmitted(rid=live.rid, need_blocks=need, **self._account()))

    def _preempt(self, live: LiveRequest, how: told.PreemptHow) -> None:
        for uid, waiting in list(self._yielded.items()):
            if live in waiting.work.lives:
                alone = all(other is live or other.cancelled for other in waiting.work.lives)
                assert alone, "a request that shares a live unit can't be preempted"
                assert how == "recompute", "a request can't be parked while a unit is half through its rows"
                self._discard(uid)
        need = 0
        if how == "recompute":
            live.kv.release()
            self.machine.park.drop(live.rid)
            live.restart()
            need = self.admission.need(live)
        self._inbox.append(told.Preempted(rid=live.rid, how=how, need_blocks=need, **self._account()))

    def _cancel(self, rid: str) -> None:
        """Mark a request; if no unit holds it, it is gone at once."""
        live = self._lives.get(rid)
        if live is None or live.cancelled:
            return
        live.cancelled, live.finish_reason = True, "cancelled"
        for uid, waiting in list(self._yielded.items()):
            if waiting.work.is_abandoned:
                self._discard(uid)
                self._inbox.append(told.UnitDone(uid=uid, dur=0.0, **self._account()))
        running = [self._running] if self._running else []
        units = (*running, *self._queue, *self._yielded.values())
        if live.rid in self._lives and not any(live in unit.work.lives for unit in units):
            self._gone(live)

    def _discard(self, uid: int) -> None:
        """A yielded unit that never goes on: those of its requests that were cancelled need not wait for it."""
        waiting = self._yielded.pop(uid)
        waiting.stops.close()
        for live in waiting.work.lives:
            if live.cancelled and live.rid in self._lives:
                self._gone(live)

    def _gone(self, live: LiveRequest) -> None:
        """A cancelled request leaves."""
        self._forget(live)
        self._outputs.append(live.decoding.output(live.finish_reason))
        self._inbox.append(told.Cancelled(rid=live.rid, **self._account()))

    def _forget(self, live: LiveRequest) -> None:
        live.stamps.finished = time.perf_counter()
        live.kv_end = live.kv.nbytes
        live.parked_cells = self.machine.park.cells(live.rid, len(live.f))
        live.kv.release()
        self.machine.park.drop(live.rid)
        if live.request.known is not None:
            self.admission.pins.release(live.request.known)
        self._lives.pop(live.rid, None)
        self._held.pop(live.rid, None)
        self._enter_after(live.rid)

    # --- units --------------------------------------------------------------------------------------------------------

    def _submit(self, unit: WorkUnit) -> None:
        for segment in unit.segments:
            live = self._lives[segment.rid]
            lawful = legal(live.f, segment, live.barriers, live.num_prompt)
            assert lawful, f"{segment} breaks the staircase {live.f}"
            if not live.is_governed(segment.kind == "decode") and (new := live.new_entries(segment)):
                live.kv.provide(segment.layer, new, segment.tok[1] if live.kv.is_identity and live.spans is None else 0)
        work = begin(self.machine, unit, [self._lives[segment.rid] for segment in unit.segments])
        self._queue.append(LiveUnit(unit, work, work.run()))

    @torch.inference_mode()
    def _run(self, live_unit: LiveUnit) -> None:
        """Run until the unit ends, is told to wait, or nobody wants it any more."""
        self._running = live_unit
        live_unit.began, live_unit.stop_wanted = self._now(), False
        for live in live_unit.work.lives:
            live.stamps.first_unit = live.stamps.first_unit or time.perf_counter()
        try:
            waits_at = self._advance(live_unit)
            if waits_at is None:
                self._done(live_unit)
            else:
                self._wait(live_unit, waits_at)
        except PartFailed as failure:
            self._fall_back(live_unit, failure)
        except BaseException:
            self._fail(live_unit)
            raise
        finally:
            self._running = None

    def _advance(self, live_unit: LiveUnit) -> Stop | None:
        """From stop to stop; returns the one to wait at, None at the end."""
        self._look()
        for stop in live_unit.stops:
            if self.on_stop is not None:
                self.on_stop(live_unit.work, stop)
            if self._look():
                self._decide(self._drain())
                self._look()
                if live_unit.work.is_abandoned:
                    live_unit.stops.close()
                    return None
            if live_unit.stop_wanted and _may_stop(live_unit.unit, stop):
                return stop
        return None

    def _fall_back(self, live_unit: LiveUnit, failure: PartFailed) -> None:
        """A part raised inside a pass: its request starts again dense, the pass's others start again as they were."""
        live_unit.stops.close()
        for live in live_unit.work.lives:
            if live.rid in self._lives and not live.cancelled:
                self._restart(live, failure)
        self._inbox.append(told.UnitDone(uid=live_unit.unit.uid, dur=self._now() - live_unit.began, **self._account()))
        for live in live_unit.work.lives:
            if live.cancelled and live.rid in self._lives:
                self._gone(live)

    def _restart(self, live: LiveRequest, failure: PartFailed) -> None:
        """From the beginning: dense if the part failed for this request; the policy is told."""
        live.kv.release()
        self.machine.park.drop(live.rid)
        how: Literal["recompute", "restart_dense"] = "recompute"
        if live.rid == failure.rid:
            log.warning("%s; the request goes on without any method", failure)
            self.num_fallbacks += 1
            how = "restart_dense"
            live.fall_back(str(failure), self.admission.table())
            if not self.admission.has_room(live):
                live.cancelled, live.finish_reason = True, "error"
        else:
            live.restart()
        need = self.admission.need(live)
        self._inbox.append(told.Preempted(rid=live.rid, how=how, need_blocks=need, **self._account()))

    def _fail(self, live_unit: LiveUnit) -> None:
        """Something was raised inside a pass (Ctrl-C too): its requests end, the others can go on."""
        live_unit.stops.close()
        self._yielded.pop(live_unit.unit.uid, None)
        self._inbox.append(told.UnitDone(uid=live_unit.unit.uid, dur=self._now() - live_unit.began, **self._account()))
        for live in live_unit.work.lives:
            if live.rid in self._lives:
                live.cancelled, live.finish_reason = True, live.finish_reason or "error"
                self._gone(live)
            else:  # it had just finished, and the policy may not know
                self._inbox.append(told.Cancelled(rid=live.rid, reason="error", **self._account()))

    def _wait(self, live_unit: LiveUnit, stop: Stop) -> None:
        self._yielded[live_unit.unit.uid] = live_unit
        self._inbox.append(
            told.UnitYielded(
                uid=live_unit.unit.uid,
                cursor=(stop.layer, stop.op),
                dur=self._now() - live_unit.began,
                **self._account(),
            )
        )

    def _done(self, live_unit: LiveUnit) -> None:
        """Sample, publish, finish; then tell the policy."""
        lives = live_unit.work.lives
        prefilled = time.perf_counter()
        for live in lives:
            if not live.stamps.prefilled and live.f[-1] >= live.num_prompt:
                live.stamps.prefilled = prefilled
                self.admission.publish_prompt(live)
                self._keep(live)
                if live.spans is not None and live.kv.is_identity:
                    live.spans.offer(live.source_context, live.kv)
                self._enter_after(live.rid)
        sampled = self._sample([live for live in lives if live.rid in live_unit.work.logits], live_unit.work)
        finished = [live for live in lives if live.finish_reason and not live.cancelled]
        for live in finished:
            self.admission.publish_all(live)
            self._forget(live)
        for cut in live_unit.work.cuts:
            self._tell_cut(cut)
        going = [live for live in lives if live.finish_reason is None]
        self._inbox.append(
            told.UnitDone(
                uid=live_unit.unit.uid,
                dur=self._now() - live_unit.began,
                sampled=sampled,
                grow={live.rid: grow for live in going if (grow := live.settle())},
                finished=tuple(live.rid for live in finished),
                **self._account(),
            )
        )
        for live in lives:
            if live.cancelled and live.rid in self._lives:
                self._gone(live)

    def _keep(self, live: LiveRequest) -> None:
        """Hand over a prompt's cells to whoever asked for them."""
        if live.request.keep is not None and not live.cancelled:
            others = [other for other in list(self._lives.values()) if other is not live]
            live.request.keep(self.admission.keep(live, others))

    def _sample(self, lives: list[LiveRequest], work: Work) -> dict[str, int]:
        """One token for each request whose last row went through the head."""
        lives = [live for live in lives if not live.cancelled]
        if not lives:
            return {}
        rows = [work.logits[live.rid] for live in lives]
        logits = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
        tokens = sample(logits, [live.decoding for live in lives])
        for i, (live, token) in enumerate(zip(lives, tokens)):
            choose = live.request.choose
            self._append(live, choose(live.ids[live.num_prompt :], logits[i]) if choose else token)
        return {live.rid: 1 for live in lives}

    def _append(self, live: LiveRequest, token: int) -> None:
        live.ids.append(token)
        live.stamps.first_token = live.stamps.first_token or time.perf_counter()
        live.finish_reason = live.decoding.take(token)
        if live.finish_reason is None and self.admission.is_full(live):
            live.finish_reason = "length"
        self._outputs.append(live.decoding.output(live.finish_reason))

    def _tell_cut(self, cut: CutTaken) -> None:
        """A cut frees what the layers above it no longer need; rows that can be revived are needed."""
        live, layer, block = cut.live, cut.layer, self.config.block_size
        if live.rid not in self._lives:
            return
        live.gone[layer + 1 :] = [n + cut.n_gone for n in live.gone[layer + 1 :]]
        expected = [int(blocks_for(live.num_prompt + 1 - gone)) for gone in live.gone]
        lack = sum(max(n - int(b), 0) for n, row in zip(expected, live.kv.num_blocks) for b in row)
        live.kv.reserve(min(live.kv.reserved, lack))
        kept = torch.bincount(cut.tok // block, minlength=-(-live.num_prompt // block)).tolist()
        news = told.Cut(rid=live.rid, layer=layer, kept=tuple(kept), n_parked=cut.n_parked, **self._account())
        self._inbox.append(news)


def _may_stop(unit: WorkUnit, stop: Stop) -> bool:
    return unit.yield_at != "none" and _LEVELS.index(stop.level) >= _LEVELS.index(unit.yield_at)
