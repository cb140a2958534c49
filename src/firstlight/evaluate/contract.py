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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlight.cache.table import blocks_for
from firstlight.core import calibration
from firstlight.core.calibration import Calibration
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, ModelFacts, PromptIds
from firstlight.core.registry import Method, classes, make_schedule
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.build import build_engine
from firstlight.engine.editing import Editing
from firstlight.engine.engine import Engine
from firstlight.engine.replay import replay
from firstlight.evaluate.chaos import Chaos
from firstlight.models.config import ModelConfig
from firstlight.models.weights.checkpoint import tensor_shapes

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY = 5, 6, 2, 16, 320
MODEL = ModelConfig("llama", LAYERS, 96, 192, HEADS, KV_HEADS, DIM, VOCABULARY, 1e-5, 10000.0, 4096, tie_head=True)
FACTS = ModelFacts("contract", LAYERS, HEADS, KV_HEADS, DIM, (None,) * LAYERS)
LENGTHS = (1, 2, 7, 8, 9, 63, 64, 65, 130, 300)
"""Prompts around what probes, tiles and blocks count in."""
NEW = 4
"""Tokens to generate, so that what was left of the K/V is read."""


_SARATHI = Method("sarathi", token_budget=64)


class Broken(Exception):
    """A check that doesn't hold: what, in one line."""


@dataclass(frozen=True)
class Subject:
    """What is checked: methods that work together, under a schedule."""

    methods: tuple[Method, ...]
    schedule: Method = _SARATHI

    def settings(self, which: str) -> Subject | None:
        """With each method's `trial` or `identity` settings; None if one has none of that name."""
        made = []
        for method in self.methods:
            given = [found for cls in classes(method.name).values() if (found := getattr(cls, which, None)) is not None]
            if not given:
                return None
            joined = {key: value for settings in given for key, value in settings.items()}
            made.append(Method(method.name, **{**joined, **method.settings}))
        return replace(self, methods=tuple(made))

    def capabilities(self) -> list[Capability]:
        """Of its parts, as its settings make them."""
        return [part.capability for part in self.engine().parts]

    def engine(self, prefix_cache: str = "off", event_log: str | None = None) -> Engine:
        """A fresh engine over the model."""
        with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
            options = Options(
                method=[_calibrated(method, Path(folder)) for method in self.methods],
                schedule=self.schedule,
                precision="f32",
                prefix_cache=prefix_cache,
                deterministic=True,
                event_log=event_log,
                max_num_seqs=8,
            )
            return build_engine(MODEL, _weights(), options, FACTS.digest)


Check = Callable[[Subject], str | None]
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

Rows = dict[str, list[Tensor]]
"""Request -> the logits of each of its generated tokens."""
Prompts = Mapping[str, Sequence[int]]


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
    }


def schedule_checks() -> dict[str, Check]:
    """What a schedule owes: `Subject` with its name, and methods that run under it or none."""
    return {
        "answers are those of one pass": _batches,
        "prompts of awkward lengths": _lengths,
        "nothing is left behind": _cancelled,
        "the log alone gives the same plans": _replayed,
    }


# --- the checks -------------------------------------------------------------------------------------------------------


def _identity(subject: Subject) -> str | None:
    if (still := subject.settings("identity")) is None:
        return "a method names no identity settings"
    prompts = _prompts(1, (1, 65, 300))
    _same(_answers(still.engine(), prompts), _answers(Subject(()).engine(), prompts), "dense", 1e-5)
    return None


def _schedules(subject: Subject) -> str | None:
    subject = _trial(subject)
    if not all(c.chunk_invariant for c in subject.capabilities()):
        return "a part says that chunks matter to it"
    for seed in range(4):
        prompts = _prompts(seed, random.Random(seed).sample(LENGTHS, 2))
        want = {rid: rows for rid in prompts for rows in [_answers(subject.engine(), {rid: prompts[rid]})[rid]]}
        _same(_answers(subject.engine(), prompts, chaos=seed), want, "one shot")
    return None


def _batches(subject: Subject) -> str | None:
    subject = _trial(subject)
    prompts = _prompts(3, (40, 130, 65))
    want: Rows = {}
    for rid, ids in prompts.items():
        want |= _answers(replace(subject, schedule=_SARATHI).engine(), {rid: ids})
    for order in (list(prompts), list(prompts)[::-1]):
        _same(_answers(subject.engine(), {rid: prompts[rid] for rid in order}), want, "alone")
    return None


def _lengths(subject: Subject) -> str | None:
    subject = _trial(subject)
    probes = {c.last_rows for c in subject.capabilities() if c.last_rows}
    around = sorted({n + more for n in probes for more in (-1, 0, 1) if n + more > 0} | set(LENGTHS))
    prompts = _prompts(4, around)
    for rid, rows in _answers(subject.engine(), prompts).items():
        if not all(bool(row.isfinite().all()) for row in rows) or len(rows) != NEW:
            raise Broken(f"a prompt of {len(prompts[rid])} tokens has no finite answer")
    return None


def _leaves_nothing(subject: Subject) -> str | None:
    subject = _trial(subject)
    for seed in range(6):
        engine, prompts = subject.engine(), _prompts(seed, (65, 200))
        _answers(engine, prompts, chaos=seed, at_stop=partial(_cancel_some, random.Random(seed), engine, list(prompts)))
        _is_empty(engine)
    return None


def _cancelled(subject: Subject) -> str | None:
    """As above, under the schedule itself."""
    subject = _trial(subject)
    for seed in range(6):
        engine, prompts = subject.engine(), _prompts(seed, (65, 200, 130))
        engine.on_stop = partial(_cancel_some, random.Random(seed), engine, list(prompts))
        _submit(engine, prompts)
        _drain(engine)
        _is_empty(engine)
    return None


def _replayed(subject: Subject) -> str | None:
    with tempfile.TemporaryDirectory(prefix="firstlight-") as folder:
        for seed in range(3):
            log = Path(folder) / f"{seed}.jsonl"
            engine, prompts = _trial(subject).engine(event_log=str(log)), _prompts(seed, (65, 200, 130))
            engine.on_stop = partial(_cancel_some, random.Random(seed), engine, list(prompts)[:1])
            _submit(engine, prompts)
            _drain(engine)
            engine.close()
            found = replay(log, lambda config: make_schedule(subject.schedule, config))
            if found.difference is not None:
                raise Broken(f"step {found.difference.step} of {found.steps} is planned in another way")
    return None


def _cells(subject: Subject) -> str | None:
    subject = _trial(subject)
    engine = subject.engine()
    lives = [engine.add(_request(rid, ids, [])) for rid, ids in _prompts(5, (65, 300)).items()]
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
    subject, prompts = _trial(subject), _prompts(6, (130, 300))
    want = _answers(subject.engine(), prompts)
    engine = subject.engine()
    engine.on_stop = lambda *_: engine.pool.poison()
    _same(_answers(engine, prompts), want, "clean blocks")
    return None


def _cached(subject: Subject) -> str | None:
    subject = _trial(subject)
    if not all(c.prefix_stable and c.chunk_invariant for c in subject.capabilities()):
        return "a part's cells depend on later tokens, or on chunks"
    ids = _prompts(7, (300,))["r0"]
    engine = subject.engine(prefix_cache="on")
    first = _answers(engine, {"a": ids})["a"]
    for rid, again in (("whole", ids), ("more", [*ids, 5, 6, 7]), ("part", ids[:200])):
        want = first if rid == "whole" else _answers(subject.engine(), {rid: again})[rid]
        _same(_answers(engine, {rid: again}), {rid: want}, "the cache off")
    return None


def _raises(subject: Subject) -> str | None:
    """Each hook of each part raises once, in one request of two."""
    subject = _trial(subject)
    prompts = _prompts(8, (65, 130))
    want, dense = _answers(subject.engine(), prompts), _answers(Subject(()).engine(), prompts)
    seen = 0
    for number in range(len(subject.engine().parts)):
        for hook in _hooks(subject.engine().parts[number].impl):
            engine = subject.engine()
            thrower = _Thrower(engine.parts[number].impl, hook)
            lives, rows = _submit(engine, prompts)
            _drain(engine)
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


# --- what they are made of --------------------------------------------------------------------------------------------


def _trial(subject: Subject) -> Subject:
    """The methods as they act on short prompts, where they say so."""
    return replace(
        subject,
        methods=tuple(
            m
            for method in subject.methods
            for m in (Subject((method,)).settings("trial") or Subject((method,))).methods
        ),
    )


@cache
def _weights() -> dict[str, Tensor]:
    """The same random weights every time."""
    generator = torch.Generator().manual_seed(5)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, generator=generator) * 0.12
        return 1 + made if "norm" in name else made

    return {name: weight(name, shape) for name, shape in tensor_shapes(MODEL).items()}


def _calibrated(method: Method, folder: Path) -> Method:
    """The method with a calibration file of its own sample, if it has one."""
    sample = next((s for cls in classes(method.name).values() if (s := getattr(cls, "sample", None))), None)
    if sample is None or calibration.KEY in method.settings:
        return method
    path = folder / method.name
    calibration.write(path, Calibration(method.name, FACTS.digest, {}, {}, sample(FACTS)))
    return Method(method.name, **{**method.settings, calibration.KEY: str(path)})


def _prompts(seed: int, lengths: Sequence[int]) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {f"r{i}": [rng.randrange(VOCABULARY) for _ in range(length)] for i, length in enumerate(lengths)}


def _request(rid: str, ids: Sequence[int], rows: list[Tensor]) -> Request:
    def greedy(_so_far: Sequence[int], logits: Tensor) -> int:
        rows.append(logits.clone())
        return int(logits.argmax())

    return Request(rid, list(ids), SamplingParams(max_tokens=NEW, ignore_eos=True), choose=greedy)


def _submit(engine: Engine, prompts: Prompts) -> tuple[list[Any], Rows]:
    rows: Rows = {rid: [] for rid in prompts}
    return [engine.add(_request(rid, _edited(engine, ids), rows[rid])) for rid, ids in prompts.items()], rows


def _edited(engine: Engine, ids: Sequence[int]) -> list[int]:
    """A prompt as it is admitted: all of it is context."""
    edited = Editing(engine.parts, engine.machine.model).edit(
        PromptIds(ids, [(0, len(ids))], "8 9 10", lambda some: " ".join(map(str, some)))
    )
    if why := edited.notes.get("why"):
        raise Broken(f"a prompt of {len(ids)} tokens was not edited: {why}")
    return edited.ids


def _drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.pool.check()


def _answers(
    engine: Engine,
    prompts: Prompts,
    chaos: int | None = None,
    at_stop: Callable[[Any, Any], None] = lambda _work, _stop: None,
) -> Rows:
    """All answers; under `chaos` any legal schedule that the seed says."""
    if chaos is not None:
        rng, engine.policy = random.Random(chaos), Chaos(chaos, LAYERS)

        def disturb(work: Any, stop: Any) -> None:
            at_stop(work, stop)
            if rng.random() < 0.05:
                engine.nudge()

        engine.on_stop = disturb
    lives, rows = _submit(engine, prompts)
    _drain(engine)
    for live in lives:
        if live.fallback:
            raise Broken(f"a request of {live.num_prompt} tokens fell back to dense: {live.fallback}")
    return rows


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
    names = (
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
    for name in names:
        if callable(getattr(part, name, None)):
            yield name


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
