"""What every method owes the engine, as checks that anybody can run: `firstlight methods check NAME`.

The list is that of README-tokens-cache, section 7, for one method or for several together, on a small model with random
weights, in float32 and deterministic mode, so that equal means equal bits. A check raises `Broken` with one line that
says what doesn't hold; it returns a reason where it has nothing to check.

A part may help with class attributes: `identity`, the settings that make the method dense; `trial`, settings under
which it acts on prompts of some hundred tokens; `sample(model)`, values for its calibration where a model has none.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from firstlight.cache.table import blocks_for
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.core.errors import UserError
from firstlight.core.registry import make_schedule
from firstlight.engine.engine import Engine
from firstlight.engine.replay import replay
from firstlight.engine.steady import SteadyPass
from firstlight.engine.work import Work
from firstlight.evaluate.trial import (
    LAYERS,
    NEW,
    SARATHI,
    UNCUT,
    Broken,
    Rows,
    Subject,
    answers,
    asking,
    drain,
    some_prompts,
    submit,
)

LENGTHS = (1, 2, 7, 8, 9, 63, 64, 65, 130, 300)
"""Prompts around what probes, tiles and blocks count in."""
Check = Callable[[Subject], str | None]
_HURRY_S = 0.5
"""Time to first token of a request that others give way to: they have a second."""
_CHUNKS_MATTER = "a part says that chunks matter to it"
_HOOKS = (
    "rows0",
    "before_layer",
    "on_kv",
    "after_attend",
    "at_barrier",
    "plan",
    "after_layer",
    "find",
    "load",
    "store",
)


def checks() -> dict[str, Check]:
    """What methods owe, by name, in the order in which it says most."""
    return {
        "identity settings are dense": _identity,
        "any schedule gives the same": _schedules,
        "alone as in any batch": _batches,
        "prompts of awkward lengths": _lengths,
        "nothing is left behind": _leaves_nothing,
        "cells add up": _cells,
        "blocks given back aren't read": _poisoned,
        "the prefix cache changes nothing": _cached,
        "one that raises falls back to dense": _raises,
        "generated tokens stay dense": _prompt_only,
        "replayed steps are as computed ones": _steady,
    }


def schedule_checks() -> dict[str, Check]:
    """What a schedule owes: `Subject` with its name, and methods that run under it or none."""
    return {
        "answers are those of one pass": _batches,
        "beside a running stream": _beside_a_stream,
        "prompts of awkward lengths": _lengths,
        "nothing is left behind": _cancelled,
        "the log alone gives the same plans": _replayed,
    }


# --- the checks -------------------------------------------------------------------------------------------------------


def _identity(subject: Subject) -> str | None:
    if (still := subject.settings("identity")) is None:
        return "a method names no identity settings"
    prompts = some_prompts(1, (1, 65, 300))
    _same(answers(still.engine(), prompts), answers(Subject(()).engine(), prompts), "dense", 1e-5)
    return None


def _schedules(subject: Subject) -> str | None:
    subject = subject.acting()
    if not all(c.chunk_invariant for c in subject.capabilities()):
        return _CHUNKS_MATTER
    for seed in range(4):
        prompts = some_prompts(seed, random.Random(seed).sample(LENGTHS, 2))
        want = {rid: rows for rid in prompts for rows in [answers(subject.engine(), {rid: prompts[rid]})[rid]]}
        _same(answers(subject.engine(), prompts, chaos=seed), want, "one shot")
    return None


def _batches(subject: Subject) -> str | None:
    subject, alone = subject.acting(), SARATHI
    if not all(c.chunk_invariant for c in subject.capabilities()):
        if subject.schedule.name != SARATHI.name:
            return _CHUNKS_MATTER
        subject, alone = replace(subject, schedule=UNCUT), UNCUT
    prompts = some_prompts(3, (40, 130, 65))
    want: Rows = {}
    for rid, ids in prompts.items():
        want |= answers(replace(subject, schedule=alone).engine(), {rid: ids})
    for order in (list(prompts), list(prompts)[::-1]):
        _same(answers(subject.engine(), {rid: prompts[rid] for rid in order}), want, "alone")
    return None


def _beside_a_stream(subject: Subject) -> str | None:
    """One decodes already when another comes, and while that one's prompt is computed comes a third, in a hurry."""
    subject = subject.acting()
    if not all(c.chunk_invariant for c in subject.capabilities()):
        return _CHUNKS_MATTER
    prompts, engine = some_prompts(11, (40, 130, 65)), subject.engine()
    stream, rows = submit(engine, {"r0": prompts["r0"]})
    while engine.has_work and not rows["r0"]:
        engine.step()
    second, more = submit(engine, {"r1": prompts["r1"]})
    lives, rows = stream + second, rows | more

    def hurry(work: Work, _stop: Any) -> None:
        if second[0] in work.lives:
            engine.on_stop, add = None, engine.add
            engine.add = lambda request: add(replace(request, ttft_slo_s=_HURRY_S))  # type: ignore[method-assign]
            third, more = submit(engine, {"r2": prompts["r2"]})
            lives.extend(third)
            rows.update(more)

    engine.on_stop = hurry
    drain(engine)
    for live in lives:
        if live.fallback:
            raise Broken(f"a request of {live.num_prompt} tokens fell back to dense: {live.fallback}")
    for rid, ids in prompts.items():
        _same({rid: rows[rid]}, answers(replace(subject, schedule=UNCUT).engine(), {rid: ids}), "alone")
    return None


def _lengths(subject: Subject) -> str | None:
    subject = subject.acting()
    probes = {c.last_rows for c in subject.capabilities() if c.last_rows}
    around = sorted({n + more for n in probes for more in (-1, 0, 1) if n + more > 0} | set(LENGTHS))
    prompts = some_prompts(4, around)
    for rid, rows in answers(subject.engine(), prompts).items():
        if not all(bool(row.isfinite().all()) for row in rows) or len(rows) != NEW:
            raise Broken(f"a prompt of {len(prompts[rid])} tokens has no finite answer")
    return None


def _leaves_nothing(subject: Subject) -> str | None:
    subject = subject.acting()
    for seed in range(6):
        engine, prompts = subject.engine(), some_prompts(seed, (65, 200))
        answers(engine, prompts, chaos=seed, at_stop=partial(_cancel_some, random.Random(seed), engine, list(prompts)))
        _is_empty(engine)
    return None


def _cancelled(subject: Subject) -> str | None:
    """As above, under the schedule itself."""
    subject = subject.acting()
    for seed in range(6):
        engine, prompts = subject.engine(), some_prompts(seed, (65, 200, 130))
        engine.on_stop = partial(_cancel_some, random.Random(seed), engine, list(prompts))
        submit(engine, prompts)
        drain(engine)
        _is_empty(engine)
    return None


def _replayed(subject: Subject) -> str | None:
    with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
        for seed in range(3):
            log = Path(folder) / f"{seed}.jsonl"
            engine, prompts = subject.acting().engine(event_log=str(log)), some_prompts(seed, (65, 200, 130))
            engine.on_stop = partial(_cancel_some, random.Random(seed), engine, list(prompts)[:1])
            submit(engine, prompts)
            drain(engine)
            engine.close()
            found = replay(log, lambda config: make_schedule(subject.schedule, config))
            if found.difference is not None:
                raise Broken(f"step {found.difference.step} of {found.steps} is planned in another way")
    return None


def _cells(subject: Subject) -> str | None:
    subject = subject.acting()
    engine = subject.engine()
    lives = [engine.add(asking(rid, ids, [])) for rid, ids in some_prompts(5, (65, 300)).items()]
    while engine.has_work:
        engine.step()
        for live in lives:
            _check_table(live.kv, live.num_known)
    for live in lives:
        held = sum(live.computed) + live.n_cached * LAYERS + live.reused
        if not 0 < held <= live.num_prompt * LAYERS:
            raise Broken(f"{live.rid}: {held} cells of {live.num_prompt * LAYERS} were computed or reused")
    return None


def _poisoned(subject: Subject) -> str | None:
    subject, prompts = subject.acting(), some_prompts(6, (130, 300))
    want = answers(subject.engine(), prompts)
    engine = subject.engine()
    engine.on_stop = lambda *_: engine.pool.poison()
    _same(answers(engine, prompts), want, "clean blocks")
    return None


def _cached(subject: Subject) -> str | None:
    subject = subject.acting()
    if not all(c.prefix_stable and c.chunk_invariant for c in subject.capabilities()):
        return "a part's cells depend on later tokens, or on chunks"
    ids = some_prompts(7, (300,))["r0"]
    engine = subject.engine(prefix_cache="on")
    first = answers(engine, {"a": ids})["a"]
    for rid, again in (("whole", ids), ("more", [*ids, 5, 6, 7]), ("part", ids[:200])):
        want = first if rid == "whole" else answers(subject.engine(), {rid: again})[rid]
        _same(answers(engine, {rid: again}), {rid: want}, "the cache off")
    return None


def _raises(subject: Subject) -> str | None:
    """Each hook of each part raises once, in one request of two; where chunks matter both come whole, since who raises
    leaves the other more of a chunk."""
    subject = subject.acting()
    if subject.schedule.name == SARATHI.name and not all(c.chunk_invariant for c in subject.capabilities()):
        subject = replace(subject, schedule=UNCUT)
    prompts = some_prompts(8, (65, 130))
    want = answers(subject.engine(), prompts)
    admitted = {live.rid: live.request.prompt_ids for live in submit(subject.engine(), prompts)[0]}
    dense = answers(Subject(()).engine(), admitted)
    seen = 0
    for number in range(len(subject.engine().parts)):
        for hook in _hooks(subject.engine().parts[number].impl):
            engine = subject.engine()
            thrower = _Thrower(engine.parts[number].impl, hook)
            lives, rows = submit(engine, prompts)
            drain(engine)
            if thrower.fired:
                seen += 1
                fallen = [live for live in lives if live.fallback]
                if len(fallen) != 1 or thrower.method_text not in fallen[0].fallback:
                    raise Broken(f"{hook} raised, and {len(fallen)} requests say that they went on dense")
                _same({fallen[0].rid: rows[fallen[0].rid]}, dense, f"dense after {hook} raised")
                others = {live.rid: rows[live.rid] for live in lives if not live.fallback}
                _same(others, want, f"what it is when {hook} doesn't raise for another request")
            _is_empty(engine)
    return None if seen else "no hook of it is called in these requests"


def _prompt_only(subject: Subject) -> str | None:
    """Planners that leave generated tokens alone aren't asked about them, whoever plans beside them."""
    engine, prompts = subject.acting().engine(), some_prompts(9, (130,))
    planners = [p.impl for p in engine.parts if p.seam == "attention" and p.impl.prompt_only]
    asked = [_Asked(planner) for planner in planners]
    answers(engine, prompts)
    if any(max(one.last, default=0) >= len(prompts["r0"]) for one in asked):
        raise Broken("a planner of prompts is asked what generated tokens read")
    return None if asked else "no planner leaves generated tokens alone"


def _steady(subject: Subject) -> str | None:
    """Decode steps from tapes (engine/steady.py): what a part says of generated tokens, it says there too."""
    subject, prompts = subject.acting(), some_prompts(10, (61, 126, 300))
    engine, computed, replays = subject.engine(), subject.engine(), list[Work]()
    engine.on_stop = lambda work, _stop: replays.append(work) if isinstance(work, SteadyPass) else None
    computed.machine.steady.most = 0
    _same(answers(engine, prompts), answers(computed, prompts), "what is computed")
    return None if replays else "a part has a say in every generated token"


# --- what they look at ------------------------------------------------------------------------------------------------


def _same(got: Rows, want: Rows, what: str, tolerance: float = 0.0) -> None:
    for rid, rows in got.items():
        pairs = list(zip(rows, want[rid]))
        apart = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
        if len(rows) != len(want[rid]) or not apart <= tolerance:
            raise Broken(f"{rid} differs from {what}: logits by {apart:.2g}")


def _cancel_some(rng: random.Random, engine: Engine, rids: Sequence[str], _work: Any, _stop: Any) -> None:
    if rng.random() < 0.05:
        engine.cancel(rng.choice(rids))


def _is_empty(engine: Engine) -> None:
    pool, parked = engine.pool, engine.machine.park.nbytes
    if pool.used or pool.reserved or parked:
        raise Broken(f"{pool.used} blocks, {pool.reserved} promised ones and {parked} parked bytes are left")


def _check_table(kv: Any, num_known: int) -> None:
    """Each token at most once in each row of the table, in order, and no more blocks than entries need."""
    if bool((kv.num_blocks > blocks_for(kv.length) + 1).any()):
        raise Broken(f"rows of {kv.length.max()} entries hold up to {kv.num_blocks.max()} blocks")
    for layer in range(LAYERS):
        tok, length = kv.ordinals(layer), kv.length[layer].tolist()
        for head, n in enumerate(length):
            row = tok[head, :n]
            if n and (bool((row[1:] <= row[:-1]).any()) or int(row[-1]) >= num_known):
                raise Broken(
                    f"layer {layer}, KV head {head} holds a token twice, out of order, or one that isn't there"
                )


def _hooks(part: Any) -> Iterator[str]:
    """Hooks that the part overrides and the engine calls for a request."""
    for name in _HOOKS:
        if callable(getattr(part, name, None)):
            yield name


class _Asked:
    """Notes the last ordinals that a planner is asked about."""

    def __init__(self, planner: Any) -> None:
        self.last: list[int] = []
        self._real, planner.plan = planner.plan, self

    def __call__(self, ctx: PlanContext) -> AttnPlan | None:
        self.last.append(int(ctx.tok[-1]))
        plan: AttnPlan | None = self._real(ctx)
        return plan


class _Thrower:
    """Raises the first time that a hook is called."""

    def __init__(self, part: Any, hook: str) -> None:
        self.fired, self._real = False, getattr(part, hook)
        self.method_text = f"{hook} broke down"
        setattr(part, hook, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.fired:
            self.fired = True
            raise RuntimeError(self.method_text)
        return self._real(*args, **kwargs)


def run(check: Check, subject: Subject) -> str | None:
    """One check. None: it holds; else why there was nothing to check. Raises Broken."""
    try:
        return check(subject)
    except UserError as error:
        raise Broken(str(error)) from None
