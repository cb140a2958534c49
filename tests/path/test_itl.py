"""`bench itl` on the tiny model: which gaps count, from when on a wait runs, and what a row says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from firstlight.cli.main import call
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.evaluate import itl
from firstlight.evaluate.itl import Scene, Stage, front, measure
from tests.tiny import VOCABULARY, save_tiny, tiny_engine

SCHEDULES = ["sarathi:token_budget=64", "layered:stage_tokens=64", "flowprefill:decode_every_ms=5"]
SCENE = Scene(streams=2, stream_tokens=8, prompt_tokens=600, repeat=2, urgent=3, urgent_tokens=16)


def stand_in(schedule: str = "sarathi") -> Any:
    """For an `LLM`, over the tiny engine."""
    options = Options(prefix_cache="off", schedule=schedule, max_num_seqs=4, max_model_len=1024)
    engine = tiny_engine(prefix_cache="off", schedule=schedule, max_num_seqs=4, max_model_len=1024)
    return SimpleNamespace(
        options=options, engine=engine, config=None, encode=lambda text: [ord(c) % VOCABULARY for c in text]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row(schedule: str) -> None:
    llm = stand_in(schedule)
    said: list[str] = []
    row = measure(llm, SCENE, said.append)
    assert row["schedule"] == schedule and row["exact"] and len(row["ttft_s"]["samples"]) == 2
    assert 0 < row["itl_s"]["p50"] <= row["itl_s"]["p99"] <= row["itl_s"]["max"]
    assert row["itl_s"]["count"] >= 4 and row["itl_alone_s"]["count"] == 2 * 2 * 16
    urgent = row["urgent"]
    assert urgent["tokens"] == 16 and len(urgent["over_s"]["samples"]) == 3 and urgent["own_s"] > 0
    assert said[0] == "warm-up" and "urgent requests, 3 of 3" in said
    assert not llm.engine.has_work and llm.engine.pool.used == 0
    json.dumps(row)


class Scripted:
    """An engine whose requests get their tokens at given steps, by a clock that goes a second a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, set[int]]) -> None:
        self.now, self.tokens, self.live = 0.0, tokens, []
        self.on_stop = None
        monkeypatch.setattr(itl.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(itl.time, "sleep", lambda s: setattr(self, "now", self.now + 0.1))

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: Any) -> None:
        self.live.append(request.rid)

    def cancel(self, rid: str) -> None:
        self.live = [other for other in self.live if other != rid]

    def step(self) -> list[Any]:
        self.now += 1.0
        due = [rid for rid in self.live if int(self.now) in self.tokens[rid.split("-")[0]]]
        self.live = [rid for rid in self.live if rid not in due or rid.startswith("stream")]
        return [SimpleNamespace(rid=rid, new_ids=[1]) for rid in due]


def test_only_gaps_that_overlap_the_prefill_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt comes at 20 and has its token at 29; the stream's tokens are at 1..20, 22, 28, 31 and later."""
    engine = Scripted(monkeypatch, {"stream": {*range(1, 21), 22, 28, 31, 33, 35}, "long": {29}})
    llm = SimpleNamespace(engine=engine, options=Options(max_model_len=1000), config=None)
    dice = SimpleNamespace(random=lambda: 0.0)
    wait, calm, gaps = itl._beside_streams(Stage(llm, [1] * 500), Scene(streams=1), dice)  # type: ignore[arg-type]
    assert wait == 9.0 and calm == [1.0] * 16 and gaps == [2.0, 6.0, 3.0]
    assert not engine.live


def test_a_wait_runs_from_the_moment_that_was_fixed() -> None:
    """Not from when the engine next looks."""
    stage = Stage(stand_in(), [1] * 600)
    long = stage.ask("long", 600, 1)
    wait = stage.first_token("urgent", 16, time.perf_counter() - 7.0)
    stage.clear([long])
    assert 7.0 < wait < 9.0


def test_the_front() -> None:
    def row(ttft: float, p99: float) -> dict[str, Any]:
        return {"ttft_s": {"median": ttft}, "itl_s": {"p99": p99}}

    assert front([row(1, 9), row(2, 5), row(3, 5), row(4, 1), row(2, 6), row(4, 1)]) == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"prompt_tokens": 0}, {"repeat": 0}, {"urgent": -1}])
def test_sizes_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="out of range; give"):
        Scene(**wrong)


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"cpu": "c", "isa": "i", "threads": 1, "torch": "t", "commit": None}
    monkeypatch.setattr("firstlight.evaluate.machine.describe_machine", lambda threads: machine)
    (tmp_path / "model").mkdir()
    sizes = [f"--{k}={v}" for k, v in {"streams": 2, "stream-tokens": 8, "prompt-tokens": 300, "repeat": 1}.items()]
    schedules = [part for name in SCHEDULES for part in ("--schedule", name)]
    asked = [
        "bench",
        "itl",
        str(save_tiny(tmp_path / "model")),
        *sizes,
        "--threads=1",
        "--max-model-len=1024",
        *schedules,
    ]
    assert call([*asked, "--results", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["schedule"] for row in rows] == SCHEDULES and rows[0]["urgent"] is None
    assert [json.loads(line)["schedule"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == SCHEDULES
    assert call(asked[:-4]) == 0 and "sarathi:token_budget=64" in capfd.readouterr().out
    for wrong, saying in (("nope", "no schedule is called 'nope'"), ("layered:x=1", "layered has no setting 'x'")):
        assert call([*asked, "--schedule", wrong]) == 2
        assert saying in capfd.readouterr().err
    assert call([*asked, "--schedule", SCHEDULES[0]]) == 2 and "named twice" in capfd.readouterr().err
