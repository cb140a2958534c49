"""Random mixes of requests with cancels at any moment: nothing leaks, the log alone makes every plan again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from firstlight.core.registry import Method, make_schedule
from firstlight.core.request import Request, SamplingParams
from firstlight.core.schedule import Event, UnitDone
from firstlight.core.view import View, ViewConfig
from firstlight.engine.engine import Engine
from firstlight.simulate.replay import replay
from tests.tiny import VOCABULARY, tiny_engine

COLUMN = 2 * 2 * 2 * 64 * 16 * 4
"""Bytes of a column of the tiny model in float32: layers, KV heads, K and V, tokens, head size, bytes."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mix(engine: Engine, seed: int, cancels: float = 0.3) -> dict[str, str | None]:
    """One to six requests that come, and partly go, at random moments; how each ended."""
    rng = random.Random(seed)
    base = [rng.randrange(VOCABULARY) for _ in range(220)]
    coming = []
    for i in range(rng.randint(1, 6)):
        length = rng.randint(1, 200)
        shared = rng.choice([0, 0, 64, 100, length])
        ids = base[: min(shared, length)] + [rng.randrange(VOCABULARY) for _ in range(length - min(shared, length))]
        sampling = SamplingParams(max_tokens=rng.randint(1, 8), temperature=rng.choice([0, 0.8]), ignore_eos=True)
        coming.append(Request(f"m{seed}-{i}", ids, sampling, priority=rng.choice([0, 0, 1])))
    ends: dict[str, str | None] = {}
    alive: list[str] = []

    def at_a_stop(*_: object) -> None:
        if coming and rng.random() < 0.02:
            alive.append(engine.add(coming.pop()).rid)
        if alive and rng.random() < 0.01 * cancels:
            engine.cancel(rng.choice(alive))

    engine.on_stop = at_a_stop
    alive.append(engine.add(coming.pop()).rid)
    while engine.has_work or coming:
        if coming and (not engine.has_work or rng.random() < 0.3):
            alive.append(engine.add(coming.pop()).rid)
        if rng.random() < 0.2 * cancels:
            engine.cancel(rng.choice(alive))
        for out in engine.step():
            if out.finish_reason:
                assert out.rid not in ends, "a request ended twice"
                ends[out.rid] = out.finish_reason
        engine.pool.check()
    assert set(ends) == set(alive), "a request never ended"
    assert engine.pool.used == 0 and engine.pool.reserved == 0 and engine.machine.park.nbytes == 0
    return ends


@pytest.mark.parametrize("options", [{}, {"prefix_cache": "off"}, {"method": ["band:sink=16,window=32"]}])
def test_random_mixes_with_cancels_leave_nothing(options: dict[str, object]) -> None:
    engine = tiny_engine(kv_memory=str(9 * COLUMN), **options)
    reasons: list[str | None] = []
    for seed in range(334):
        reasons += mix(engine, seed).values()
    assert reasons.count("cancelled") > 50 and reasons.count("length") > 200


def test_small_pools_preempt_and_still_answer_the_same() -> None:
    """Greedy answers under preemption equal those of a large pool."""

    def answers(columns: int) -> tuple[dict[str, list[int]], int]:
        engine, rng = tiny_engine(kv_memory=str(columns * COLUMN), deterministic=True), random.Random(3)
        got: dict[str, list[int]] = {}
        lives = []
        for i in range(4):
            ids = [rng.randrange(VOCABULARY) for _ in range(60)]
            lives.append(engine.add(Request(f"r{i}", ids, SamplingParams(max_tokens=90, ignore_eos=True))))
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
                engine.pool.layout.k[1:] = engine.pool.layout.v[1:] = torch.nan
            rng = random.Random(seed)
            ids = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 63, 130, 400]))]
            engine.add(Request(f"r{seed}", ids, SamplingParams(max_tokens=70, ignore_eos=True)))
            while engine.has_work:
                got += [i for out in engine.step() for i in out.new_ids]
        return got

    assert answer(poison=True) == answer(poison=False)


def written(path: Path, seed: int) -> Path:
    engine = tiny_engine(kv_memory=str(9 * COLUMN), event_log=str(path))
    mix(engine, seed)
    engine.close()
    return path


def fresh(config: ViewConfig):  # type: ignore[no-untyped-def]
    return make_schedule(Method(config.schedule["name"], **config.schedule["settings"]), config)


def test_the_log_alone_makes_every_plan_again(tmp_path: Path) -> None:
    for seed in range(200):
        found = replay(written(tmp_path / "log", seed), fresh)
        assert found.steps and found.difference is None, str(found.difference)


def test_a_broken_fold_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "log", 7)
    whole = View.after

    def forgets(view: View, now: float, events: list[Event]) -> View:
        return whole(view, now, [e for e in events if not isinstance(e, UnitDone) or e.uid % 2])

    monkeypatch.setattr(View, "after", forgets)
    assert replay(path, fresh).difference is not None
