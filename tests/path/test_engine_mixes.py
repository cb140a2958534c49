"""Random mixes of requests with cancels at any moment: nothing leaks, the log alone makes every plan again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from firstlight.core.parts import Capability, Cut, Keep, Obs, PartContext, RequestRows, Retention, RowPolicy
from firstlight.core.registry import Method, Part, make_schedule
from firstlight.core.request import Request, SamplingParams
from firstlight.core.schedule import Event, Preempted, UnitDone, UnitYielded
from firstlight.core.view import View, ViewConfig
from firstlight.engine import build
from firstlight.engine.engine import Engine
from firstlight.engine.replay import replay
from firstlight.evaluate.chaos import Chaos
from tests.tiny import VOCABULARY, tiny_engine

COLUMN = 2 * 2 * 2 * 64 * 16 * 4
"""Bytes of a column of the tiny model in float32: layers, KV heads, K and V, tokens, head size, bytes."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Counted:
    """What mixes brought about: a test of leaks is worth what happens in it."""

    ends: list[str | None] = field(default_factory=list)
    num_preempted: int = 0
    num_yielded: int = 0

    def watch(self, engine: Engine) -> None:
        decide = engine._decide

        def counting(events: list[Event]) -> None:
            self.num_preempted += sum(isinstance(e, Preempted) for e in events)
            self.num_yielded += sum(isinstance(e, UnitYielded) for e in events)
            decide(events)

        engine._decide = counting  # type: ignore[method-assign]


def some_length(rng: random.Random) -> int:
    """Often just short of a column, so that the answer grows into another one."""
    return rng.choice([rng.randint(1, 200), rng.randint(57, 64), rng.randint(121, 128)])


def mix(engine: Engine, seed: int, chaos: bool = False) -> dict[str, str | None]:
    """One to six requests that come, and partly go, at random moments, inside units too; how each ended."""
    rng = random.Random(seed)
    base = [rng.randrange(VOCABULARY) for _ in range(220)]
    coming = []
    for i in range(rng.randint(1, 6)):
        length = some_length(rng)
        shared = rng.choice([0, 0, 64, 100, length])
        ids = base[: min(shared, length)] + [rng.randrange(VOCABULARY) for _ in range(length - min(shared, length))]
        sampling = SamplingParams(max_tokens=rng.randint(1, 8), temperature=rng.choice([0, 0.8]), ignore_eos=True)
        about = {"priority": rng.choice([0, 0, 1]), "ttft_slo_s": rng.choice([None, 1e-3, 0.05])}
        coming.append(Request(f"m{seed}-{i}", ids, sampling, **about))
    ends: dict[str, str | None] = {}
    alive: list[str] = []

    def at_a_stop(*_: object) -> None:
        if coming and rng.random() < 0.05:
            alive.append(engine.add(coming.pop()).rid)
        if alive and rng.random() < 0.03:
            engine.cancel(rng.choice(alive))
        if chaos and rng.random() < 0.1:
            engine.nudge()

    engine.on_stop = at_a_stop
    if chaos:
        engine.policy = Chaos(seed, engine.config.num_layers, widest=60)
    alive.append(engine.add(coming.pop()).rid)
    while engine.has_work or coming:
        if coming and (not engine.has_work or rng.random() < 0.3):
            alive.append(engine.add(coming.pop()).rid)
        if rng.random() < 0.03:
            engine.cancel(rng.choice(alive))
        for out in engine.step():
            if out.finish_reason:
                assert out.rid not in ends, "a request ended twice"
                ends[out.rid] = out.finish_reason
        engine.pool.check()
    assert set(ends) == set(alive), "a request never ended"
    assert engine.pool.used == 0 and engine.pool.reserved == 0 and engine.machine.park.nbytes == 0
    assert not engine._queue and not engine._yielded
    return ends


class ParksHalf(RowPolicy):
    """A barrier and a cut: prompts that are cut in chunks wait there for their rest."""

    def barriers(self) -> tuple[int, ...]:
        return (0,)

    def at_barrier(self, layer: int, tok: Tensor, obs: Obs | None, ctx: PartContext) -> Cut:
        return Cut(keep=tok[::2], park=True)


@pytest.mark.parametrize(
    ("schedule", "num_preempted", "num_yielded"),
    [
        ("layered:stage_tokens=16,max_tokens=90", 3, 0),
        ("flowprefill:decode_every_ms=1,batch_tokens=90,max_parked=1", 1, 20),
    ],
)
@pytest.mark.parametrize("parked", [False, True], ids=["plain", "barrier"])
def test_every_schedule_leaves_nothing(
    schedule: str, num_preempted: int, num_yielded: int, parked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pool that preempts; cancels reach units that stand half through, and requests between two groups."""
    if parked:
        part = Part("half", "tokens", ParksHalf(), None, Capability(alters_cells=False, prefix_stable=False))
        monkeypatch.setattr(build, "make_parts", lambda methods, model: [part])
    engine = tiny_engine(kv_memory=str(4 * COLUMN), schedule=schedule)
    counted = Counted()
    counted.watch(engine)
    for seed in range(50):
        counted.ends += mix(engine, seed).values()
    assert counted.ends.count("cancelled") > 15 and counted.ends.count("length") > 60
    assert counted.num_preempted >= num_preempted and counted.num_yielded >= num_yielded


class KeepsTheFirst(RowPolicy):
    """A cut after which most chunks of a prompt have no row left."""

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        return Cut(keep=rows.tok[rows.tok < 5]) if layer == 0 and not ctx.decode else None


@pytest.mark.parametrize("schedule", ["sarathi:token_budget=16,lift=off", "layered:stage_tokens=4", "flowprefill"])
def test_a_chunk_without_rows(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the layers above with nothing to do."""
    part = Part("first", "tokens", KeepsTheFirst(), None, Capability(alters_cells=False, prefix_stable=False))
    monkeypatch.setattr(build, "make_parts", lambda methods, model: [part])
    engine = tiny_engine(schedule=schedule)
    ends = [end for seed in range(10) for end in mix(engine, seed).values()]
    assert "length" in ends and set(ends) <= {"length", "cancelled"} and engine.num_fallbacks == 0


@pytest.mark.parametrize("options", [{}, {"prefix_cache": "off"}, {"method": ["band:sink=16,window=32"]}])
@pytest.mark.parametrize("chaos", [False, True], ids=["sarathi", "chaos"])
def test_random_mixes_with_cancels_leave_nothing(options: dict[str, object], chaos: bool) -> None:
    """Under `sarathi` in a pool that preempts; under a policy that yields and parks whatever it can, in a large one."""
    columns = 40 if chaos else 4
    engine = tiny_engine(kv_memory=str(columns * COLUMN), schedule="sarathi:token_budget=16", **options)
    counted = Counted()
    counted.watch(engine)
    for seed in range(167):
        counted.ends += mix(engine, seed, chaos).values()
    assert counted.ends.count("cancelled") > 60 and counted.ends.count("length") > 100
    assert counted.num_preempted > (200 if chaos else 8) and counted.num_yielded > (500 if chaos else 20)


class Halver(Retention):
    """Of prompts past a column, each head keeps other halves; shorter ones stay whole and are cached."""

    def after_layer(self, layer, tok, length, obs, ctx):  # type: ignore[no-untyped-def]
        if ctx.prompt_len < 70:
            return None
        return Keep([torch.arange(head % 2, n, 2) for head, n in enumerate(length)])


@pytest.mark.parametrize("columns", [4, 6, 40])
def test_a_retention_frees_what_it_drops_and_takes_no_more_than_promised(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rewrites columns that it shares with the cache, in pools that have no spare block."""
    part = Part("halver", "cache", Halver(), None, Capability(exact=False, alters_cells=False))
    monkeypatch.setattr(build, "make_parts", lambda methods, model: [part])
    engine = tiny_engine(kv_memory=str(columns * COLUMN))
    hits = 0
    for seed in range(100):
        mix(engine, seed)
        assert engine.cache is not None
        hits += len(engine.cache) > 0
    live = engine.add(Request("last", [5] * 200, SamplingParams(max_tokens=3, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert hits and live.kv_end == 2 * COLUMN < live.kv.peak_nbytes == 4 * COLUMN


def test_small_pools_preempt_and_still_answer_the_same() -> None:
    """Greedy and drawn answers under preemption equal those of a large pool."""

    def answers(columns: int) -> tuple[dict[str, list[int]], int]:
        engine, rng = tiny_engine(kv_memory=str(columns * COLUMN), deterministic=True), random.Random(3)
        got: dict[str, list[int]] = {}
        lives = []
        for i in range(4):
            ids = [rng.randrange(VOCABULARY) for _ in range(60)]
            sampling = SamplingParams(max_tokens=90, temperature=i / 3, seed=i or None, ignore_eos=True)
            lives.append(engine.add(Request(f"r{i}", ids, sampling)))
        while engine.has_work:
            for out in engine.step():
                got.setdefault(out.rid, []).extend(out.new_ids)
            engine.pool.check()
        return got, sum(live.num_preempted for live in lives)

    plenty, none = answers(40)
    scarce, some = answers(6)
    assert none == 0 and some > 0
    assert scarce == plenty


def test_poisoned_free_blocks_never_reach_an_answer() -> None:
    def answer(poison: bool) -> list[int]:
        engine = tiny_engine(kv_memory=str(20 * COLUMN), prefix_cache="off")
        got: list[int] = []
        for seed in range(3):
            if poison:
                engine.pool.poison()
            rng = random.Random(seed)
            ids = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 63, 130, 400]))]
            engine.add(Request(f"r{seed}", ids, SamplingParams(max_tokens=70, ignore_eos=True)))
            while engine.has_work:
                got += [i for out in engine.step() for i in out.new_ids]
        return got

    assert answer(poison=True) == answer(poison=False)


def written(path: Path, seed: int, schedule: str = "sarathi:token_budget=16") -> Path:
    engine = tiny_engine(kv_memory=str(4 * COLUMN), schedule=schedule, event_log=str(path))
    mix(engine, seed)
    engine.close()
    return path


def fresh(config: ViewConfig):  # type: ignore[no-untyped-def]
    return make_schedule(Method(config.schedule["name"], **config.schedule["settings"]), config)


@pytest.mark.parametrize(
    "schedule",
    ["sarathi:token_budget=16", "layered:stage_tokens=16,max_tokens=90", "flowprefill:decode_every_ms=1"],
)
def test_the_log_alone_makes_every_plan_again(tmp_path: Path, schedule: str) -> None:
    for seed in range(200):
        found = replay(written(tmp_path / "log", seed, schedule), fresh)
        assert found.steps and found.difference is None, str(found.difference)


def test_a_broken_fold_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "log", 7)
    whole = View.after

    def forgets(view: View, now: float, events: list[Event]) -> View:
        return whole(view, now, [e for e in events if not isinstance(e, UnitDone) or e.uid % 2])

    monkeypatch.setattr(View, "after", forgets)
    assert replay(path, fresh).difference is not None


@pytest.mark.parametrize("schedule", ["sarathi:token_budget=48", "layered:stage_tokens=32", "flowprefill"])
@pytest.mark.parametrize("prefix_cache", ["on", "off"])
def test_nobody_reads_what_was_not_written(schedule: str, prefix_cache: str) -> None:
    """Blocks come back full of what others left, here nan, and those that a prompt fills aren't zeroed."""
    engine = tiny_engine(kv_memory=str(13 * COLUMN), schedule=schedule, prefix_cache=prefix_cache)
    rng, broken = random.Random(5), list[bool]()
    engine.on_stop = lambda *_: engine.pool.poison()
    shared = [rng.randrange(VOCABULARY) for _ in range(200)]

    def chosen(_so_far: list[int], logits: Tensor) -> int:
        broken.append(bool(logits.isnan().any()))
        return int(logits.nan_to_num().argmax())

    for number in range(30):
        own = [rng.randrange(VOCABULARY) for _ in range(some_length(rng))]
        ids = shared[: rng.choice([0, 30, 64, 128, 200])] + own
        params = SamplingParams(max_tokens=rng.randint(1, 70), ignore_eos=True)
        engine.add(Request(str(number), ids, params, choose=chosen))
        for _ in range(rng.randint(0, 6)):
            engine.step()
        if rng.random() < 0.2 and engine._lives:
            engine.cancel(rng.choice(list(engine._lives)))
    while engine.has_work:
        engine.step()
    assert len(broken) > 300 and not any(broken)
