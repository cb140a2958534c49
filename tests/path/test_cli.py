"""The command line from prompt to exit code, with the real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from firstlight.cli import docs
from firstlight.cli.main import call
from firstlight.core.files import cache_dir
from tests.terminal import Terminal

KEYS = {
    *("schema_version", "model", "exact", "prompt_tokens", "cached_tokens", "completion_tokens", "text", "token_ids"),
    *("finish_reason", "ttft_s", "tpot_s", "timings", "cells", "attention", "kv", "methods", "settings"),
}
DOCUMENT = docs.checkout() / "src/firstlight/evaluate/texts/moby-dick-chapter-87.txt"

SILENT = "f32"
"""A precision that no processor is advised against."""


@pytest.fixture
def model(smollm2_path: Path) -> str:
    return str(smollm2_path)


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115, PTH123


def firstlight(*arguments: str, **settings: int) -> subprocess.Popen[bytes]:
    """The program as a process of its own."""
    command = [sys.executable, "-m", "firstlight.cli", *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **(streams | settings))


def test_json_has_every_key_and_its_times_add_up(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", model, "-p", "Name a colour.", "--max-tokens", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() >= KEYS
    timings = report["timings"]
    parts = ("tokenize_s", "queue_s", "reuse_s", "prefill_s", "sample_s")
    assert sum(timings[key] for key in parts) == pytest.approx(report["ttft_s"], abs=1e-3)
    cells = report["cells"]
    assert cells["computed"] + cells["reused"] + cells["parked"] + cells["absent"] == cells["total"]
    assert report["exact"] and report["attention"]["density"] == 1.0
    assert len(report["token_ids"]) == report["completion_tokens"] <= 8


def test_the_stream_is_the_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", model, "-p", "Write a line with an emoji.", "--max-tokens", "12"]
    assert call(line) == 0
    streamed = capsys.readouterr().out
    assert call([*line, "--json"]) == 0
    assert streamed.rstrip("\n") == json.loads(capsys.readouterr().out)["text"].rstrip("\n")


def test_a_run_is_replayed_from_its_log(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(tmp_path / "run.log")
    assert call(["run", model, "-p", "Count to five.", "--max-tokens", "6", "--event-log", log]) == 0
    capsys.readouterr()
    assert call(["simulate", "--replay", log]) == 0
    assert "all plans identical" in capsys.readouterr().out


def test_an_approximate_run_reports_its_density(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"word{n}" for n in range(100))
    line = ["run", model, "-p", words, "--raw", "--max-tokens", "2", "--method", "band:sink=16,window=64", "--json"]
    assert call(line) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not report["exact"] and report["attention"]["density"] < 0.8
    assert "approximate: band" in err


def test_bench_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", "ttft", model, "--prompt-tokens", "96,130", "--tokens", "3", "--repeat", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"cpu", "isa", "cores", "memory_gib", "torch", "commit", "peak_gflops"} <= found["machine"].keys()
    assert [row["prompt_tokens"] for row in found["rows"]] == [96, 130]
    for row in found["rows"]:
        ttft = row["ttft_s"]
        assert len(ttft["samples"]) == 2 and ttft["min"] <= ttft["median"] <= ttft["max"]
        assert row["engine"] == "firstlight" and row["exact"]
        assert 0 < row["mfu"] < 1.2 and row["decode_tok_s"] > 0 and row["rss_mb"] > 100


def test_bench_throughput(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "bench",
        "throughput",
        model,
        "--batch",
        "3",
        "--prompt-tokens",
        "20,30,40",
        "--tokens",
        "3",
        "--repeat",
        "1",
    ]
    assert call([*line, "--json"]) == 0
    alone, three = json.loads(capsys.readouterr().out)["rows"]
    assert (alone["batch"], three["batch"]) == (1, 3) and alone["prompt_tokens"] == three["prompt_tokens"] == [
        20,
        30,
        40,
    ]
    assert alone["gain"] == 1.0 and three["new_tok_s"] == pytest.approx(three["gain"] * alone["new_tok_s"])
    assert three["settings"]["max_num_seqs"] == 3 and three["settings"]["max_model_len"] == 43


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "long", reason="takes minutes: in the long profile")
def test_a_contest_of_our_own_engines(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    line = ["bench", "ttft", model, "--against", "firstlight-f32", "--prompt-tokens", "40", "--tokens", "2"]
    assert call([*line, "--repeat", "1", "--json", "--results", str(results)]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["exact"]]
    assert [row["engine"] for row in rows] == ["firstlight", "firstlight-f32"]
    assert all(row["failed"] is None and row["limit_s"] < row["ttft_s"]["median"] for row in rows)
    assert rows[1]["agreement"] == {"equal": 64, "of": 64}, "float32 agrees with itself"
    assert rows[0]["agreement"]["equal"] > 48, "and bf16 with it, almost always"
    assert model not in results.read_text() and len(results.read_text().splitlines()) >= 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["-p", "x", "--method", "nothing"], "no method is called 'nothing'; choose one of: band"),
        (["-p", "x", "--method", "band:size=3"], "band has no setting 'size'; it has: sink, window"),
        (
            ["-p", "x", "--schedule", "nothing"],
            "no schedule is called 'nothing'; choose one of: flowprefill, layered, sarathi",
        ),
        (["-p", "x", "--kv-memory", "1KiB"], "KV"),
        (
            ["-f", str(DOCUMENT), "-p", "x", "--max-model-len", "100"],
            "tokens, the limit is 99; shorten it or raise max_model_len",
        ),
        (["-p", "x " * 9000], "tokens, the limit is 8191; shorten it\n"),
    ],
)
def test_the_engines_refusals(line: list[str], said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", model, *line]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_bad_model_file(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.gguf"
    if content is not None:
        file.write_bytes(content)
    assert call(["run", str(file), "-p", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "bad.gguf" in err and err.count("\n") == 1


def test_ctrl_c_in_a_long_prefill(model: str, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    process = firstlight(
        "run", model, "-f", str(DOCUMENT), "-p", "What is this?", "--event-log", str(log), "--precision", SILENT
    )
    deadline = time.monotonic() + 120
    while "WorkUnit" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # into the pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.fixture
def chat(model: str, tmp_path: Path) -> Callable[..., Terminal]:
    """A chat with the shared weight cache, and a history of its own."""
    (tmp_path / "weights").symlink_to(cache_dir() / "weights")
    env = {"FIRSTLIGHT_CACHE": str(tmp_path)}
    return lambda *flags: Terminal(["-m", "firstlight.cli", "run", model, *flags], env)


def test_a_chat(chat: Callable[..., Terminal]) -> None:
    with chat("--max-tokens", "5", "--max-model-len", "200") as terminal:
        terminal.expect("context 200 tokens")
        terminal.type("Name a colour.\r")
        first = terminal.expect("tokens/s after the first")
        assert " 0 from the cache" in first and "first token" in first
        terminal.type("And another one.\r")
        cached = int(re.findall(r"(\d+) from the cache", terminal.expect("tokens/s after the first"))[0])
        prompt = int(re.findall(r"(\d+) prompt tokens", first)[0])
        assert cached >= prompt  # all of the first turn was known
        terminal.type("/stats\r")
        assert f"{cached} from the cache" in terminal.expect("tokens/s after it")
        terminal.type("long " * 200 + "\r")
        terminal.expect("tokens, the limit is 199")
        terminal.expect("Nothing was added; /reset begins a new conversation")
        terminal.type("/exit\r")
        assert terminal.leave() == 0 and "Traceback" not in terminal.unread


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat: Callable[..., Terminal]) -> None:
    with chat("--ignore-eos", "--max-tokens", "4000") as terminal:
        terminal.expect("> ")
        terminal.type("Tell a story about a whale.\r")
        terminal.expect("whale", 60)  # what was typed
        terminal.expect("whale", 60)  # what is told
        terminal.interrupt("stopped; what was said stays in the conversation")
        terminal.type("/exit\r")
        assert terminal.leave() == 0 and "Traceback" not in terminal.unread


def test_a_reader_that_goes_away(model: str) -> None:
    process = firstlight("run", model, "-p", "Tell a long story.", "--max-tokens", "30", "--precision", SILENT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
