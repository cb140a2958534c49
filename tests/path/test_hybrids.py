"""Models with window layers from prompt to token: memory behind the window, hits that end where a window is held."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.cache import windows
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.engine.report import report
from tests.tiny import HYBRIDS, VOCABULARY, WINDOW, tiny_engine

BLOCK_NBYTES = 2 * 64 * 16 * 4


def ask(engine: Engine, ids: list[int], rid: str, new: int = 3) -> tuple[LiveRequest, dict[int, Any]]:
    """Logits of all prompt rows that were computed, the tokens under -1."""
    rows: dict[int, Any] = {}
    sink = lambda tok, logits: rows.update(zip(tok.tolist(), logits.clone()))  # noqa: E731
    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    live = engine.add(Request(rid, ids, sampling, logits_at="all", logits_sink=sink))
    while engine.has_work:
        engine.step()
        engine.pool.check()
        assert engine.pool.available >= 0
    return live, rows | {-1: live.ids[live.num_prompt :]}


@pytest.mark.parametrize("family", HYBRIDS)
@settings(max_examples=4)
@given(seed=st.integers(0, 10**6))
def test_a_prefix_cache_changes_no_bit(family: str, seed: int) -> None:
    rng = random.Random(seed)
    base = [rng.randrange(VOCABULARY) for _ in range(500)]
    on = tiny_engine(family, 3, deterministic=True)
    off = tiny_engine(family, 3, deterministic=True, prefix_cache="off")
    seen: list[list[int]] = []
    for i in range(4):
        shared = rng.choice([0, 100, 256, 400, 500])
        begun = rng.choice(seen) if seen and rng.random() < 0.6 else base[:shared]
        ids = [*begun, *(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 30, 64])))]
        live, got = ask(on, ids, f"r{i}")
        want = ask(off, ids, f"r{i}")[1]
        assert len(got) == len(ids) - live.n_cached + 1
        assert all(torch.equal(torch.as_tensor(got[t]), torch.as_tensor(want[t])) for t in got)
        assert live.n_cached == len(begun) or begun not in seen, "the next turn of a conversation begins where it ended"
        seen.append(ids)
    assert on.pool.used == 0 and on.pool.reserved == 0


def test_a_prompt_runs_in_less_memory_than_all_its_cells() -> None:
    """Of three layers one is global: a pool of 45 % of the cells will do, and the report says what was held."""
    ids = [i * 7 % VOCABULARY for i in range(1280)]
    whole = 6 * 21 * BLOCK_NBYTES
    small = tiny_engine("gemma3", 3, prefix_cache="off", kv_memory=str(int(0.8 * whole)))
    live, got = ask(small, ids, "a", 5)
    kv = report(live, [])["kv"]
    # The global layer, one local layer in full at the time of its pass, the other one's window.
    assert kv["bytes_peak"] <= (2 * 21 + 2 * 20 + 2 * 3) * BLOCK_NBYTES
    assert kv["bytes_end"] <= (2 * 21 + 4 * 3) * BLOCK_NBYTES
    large = tiny_engine("gemma3", 3, prefix_cache="off")
    assert ask(large, ids, "a", 5)[1][-1] == got[-1]


def test_chunks_free_while_the_prefill_goes_on() -> None:
    engine = tiny_engine("mistral", 2, prefix_cache="off", schedule="sarathi:token_budget=64,lift=false")
    engine.add(Request("r", [i % VOCABULARY for i in range(1500)], SamplingParams(max_tokens=2, ignore_eos=True)))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.pool.used)
    assert most <= 2 * 2 * (-(-(WINDOW + 64) // 64) + 1), "blocks in use, of 96 that all cells would take"


def test_long_answers_and_many_requests_in_a_small_pool() -> None:
    """Decodes that leave their windows' blocks behind, preempted and replayed: the answers of a large pool."""
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.choice([30, 200, 330]))] for _ in range(4)]

    def answers(**options: Any) -> tuple[dict[str, list[int]], int]:
        engine = tiny_engine("gemma3", 3, deterministic=True, schedule="sarathi:token_budget=64", **options)
        lives = [
            engine.add(Request(f"r{i}", ids, SamplingParams(max_tokens=110, ignore_eos=True)))
            for i, ids in enumerate(prompts)
        ]
        while engine.has_work:
            engine.step()
            engine.pool.check()
        assert engine.pool.used == 0 and engine.pool.reserved == 0
        return {live.rid: live.ids for live in lives}, sum(live.num_preempted for live in lives)

    want, _ = answers()
    got, preempted = answers(kv_memory=str(11 * 6 * BLOCK_NBYTES))
    assert got == want and preempted > 0


@pytest.mark.parametrize("family", HYBRIDS)
def test_windows_stay_at_places_all_along_a_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts that part long before their ends share what lies before the last place that keeps its window."""
    monkeypatch.setattr(windows, "_EVERY", 512)
    monkeypatch.setattr(windows, "_EVERY_WINDOWS", 1)
    engine = tiny_engine(family, 2, deterministic=True)
    ids = [i * i % VOCABULARY for i in range(1500)]
    ask(engine, ids, "a")
    for shared, cached in ((1499, 1499), (1200, 1024), (800, 512), (1024, 1024), (300, 0)):
        asked = [*ids[:shared], 7, 8]
        live, got = ask(engine, asked, f"b{shared}", 1)
        assert live.n_cached == cached
        assert (cached == shared) == ("no window is kept" not in live.miss_reason)
        fresh = ask(tiny_engine(family, 2, deterministic=True, prefix_cache="off"), asked, "c", 1)[1]
        assert torch.equal(got[len(asked) - 1], fresh[len(asked) - 1])


def test_density_counts_what_windows_hide() -> None:
    ids = [i % VOCABULARY for i in range(600)]
    engine = tiny_engine("mistral", 2)
    triangle = 600 * 601 / 2
    seen = triangle - (600 - WINDOW) * (601 - WINDOW) / 2
    assert report(ask(engine, ids, "r")[0], [])["attention"]["density"] == pytest.approx(seen / triangle)
