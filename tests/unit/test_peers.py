"""The contest with stand-ins for the peers: one that works, and ones that crash, hang, lie or can't be installed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.evaluate.peers import environments, process
from firstlight.evaluate.peers.contest import Contest, Task
from firstlight.evaluate.peers.recipes import PRECISIONS, Recipe, Variant, ours, recipes
from firstlight.evaluate.peers.runners import host
from tests.tiny import tiny_config

RUNNER = """
import os, time

class Engine:
    version, exact = "7", None
    def __init__(self, settings):
        self.settings = settings
    def generate(self, ids, num_tokens, tell):
        time.sleep(self.settings.get("pause", 0))
        for _ in range(num_tokens):
            tell(ids[0])

def open_engine(job):
    print("engines talk, and not always in JSON")
    trouble = job["settings"].get("trouble")
    if trouble == "crash":
        os.kill(os.getpid(), 11)
    if trouble == "hang":
        time.sleep(60)
    if trouble == "error":
        raise ValueError("no such weights in /somewhere/models/file.gguf")
    if trouble == "mute":
        Engine.generate = lambda self, ids, num_tokens, tell: None
    if trouble == "late crash":
        real = Engine.generate
        def generate(self, ids, num_tokens, tell):
            os.kill(os.getpid(), 11) if len(ids) > 100 else real(self, ids, num_tokens, tell)
        Engine.generate = generate
    return Engine(job["settings"])
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "run_fake.py"
    file.write_text(RUNNER)
    return str(file)


@pytest.fixture
def contest(tmp_path: Path, runner: str) -> Callable[..., list[dict[str, Any]]]:
    """All rows of a contest of recipes, on two short prompts."""

    def rows(*peers: Recipe, **changed: Any) -> list[dict[str, Any]]:
        model = tmp_path / "model.gguf"
        model.touch()
        task = Task(
            path=model,
            digest="d",
            config=tiny_config(),
            text=list(range(200)),
            lengths=[20, 150],
            tokens=2,
            rounds=2,
            threads=1,
            peaks={"f32": 1.0, "bf16": 2.0, "int8": 4.0},
            sweep_at=30,
        )
        reference = Recipe("reference", runner, variants=[Variant("reference", "shipped", {}, True)])
        contest = Contest(replace(task, **changed), peers, lambda _: None, reference=reference, converter=reference)
        return list(contest.rows())

    return rows


def peer(name: str, runner: str, *settings: dict[str, Any], exact: bool = True, **about: Any) -> Recipe:
    return Recipe(name, runner, variants=[Variant(name, "shipped", s, exact) for s in settings], **about)


def test_a_peer_that_works(contest: Callable[..., Any], runner: str) -> None:
    rows = contest(peer("good", runner, {}))
    assert [(row["engine"], row["version"], row["prompt_tokens"]) for row in rows] == [
        ("good", "7", 20),
        ("good", "7", 150),
    ]
    for row in rows:
        assert row["failed"] is None and row["exact"] is True
        assert len(row["ttft_s"]["samples"]) == len(row["tpot_s"]["samples"]) == 2, "one a round"
        assert row["agreement"] == {"equal": 64, "of": 64}
        assert row["mfu"] == pytest.approx(row["limit_s"] / row["ttft_s"]["median"])


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("crash", "crashed: SIGSEGV"),
        ("hang", "no answer within 5 s"),
        ("error", "ValueError: no such weights in file.gguf"),
        ("mute", "RuntimeError: 0 tokens came instead of 3"),
    ],
)
def test_a_peer_in_trouble_is_a_row_and_not_the_end(
    contest: Callable[..., Any], runner: str, trouble: str, reason: str
) -> None:
    began = time.monotonic()
    rows = contest(peer("bad", runner, {"trouble": trouble}), peer("good", runner, {}), limit_s=5.0)
    assert [(row["engine"], row["failed"]) for row in rows] == [("bad", reason)] * 2 + [("good", None)] * 2
    assert time.monotonic() - began < 30, "a peer that failed has no part in later rounds"


def test_what_came_before_a_crash_counts(contest: Callable[..., Any], runner: str) -> None:
    short, long = contest(peer("late", runner, {"trouble": "late crash"}))
    assert len(short["ttft_s"]["samples"]) == 1 and short["failed"] == long["failed"] == "crashed: SIGSEGV"
    assert "ttft_s" not in long


def test_a_peer_that_cannot_be_installed(contest: Callable[..., Any], runner: str, tmp_path: Path) -> None:
    install = [["--no-index", "--find-links", str(tmp_path), "no-such-package-at-all"]]
    rows = contest(peer("absent", runner, {}, install=install), peer("good", runner, {}), rounds=1)
    assert [row["engine"] for row in rows] == ["absent", "absent", "good", "good"]
    assert "absent can't be installed: No matching distribution" in rows[0]["failed"]
    assert str(tmp_path) not in json.dumps(rows), "results name no path of this machine"
    assert not list(environments.home().glob("absent-*")), "half an environment is none"


def test_the_best_two_settings_run_and_the_sweep_is_remembered(
    contest: Callable[..., Any], runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_share", lambda before, after: 0.1)
    settings = [{"pause": 0.2}, {"pause": 0.05}, {"trouble": "crash"}, {"pause": 0}]
    rows = contest(peer("swept", runner, *settings), rounds=1)
    assert [row["settings"].get("pause") for row in rows] == [None, 0, 0, 0.05, 0.05], "the crash, then the fastest"
    kept = [json.loads(line) for line in (environments.home() / "sweeps.jsonl").read_text().splitlines()]
    assert len(kept) == 3
    contest(peer("swept", runner, *settings), rounds=1)
    assert len((environments.home() / "sweeps.jsonl").read_text().splitlines()) == 3
    contest(peer("swept", runner, *settings), rounds=1, sweep_again=True)
    assert len((environments.home() / "sweeps.jsonl").read_text().splitlines()) == 6


def test_what_a_busy_machine_gave_is_not_remembered(
    contest: Callable[..., Any], runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_share", lambda before, after: 0.8)
    rows = contest(peer("swept", runner, {"pause": 0}, {"pause": 0.1}, {"pause": 0.2}), rounds=1, lengths=[20])
    assert [row["settings"]["pause"] for row in rows] == [0, 0.1], "this run takes it all the same"
    assert not (environments.home() / "sweeps.jsonl").exists()


def test_an_interrupted_contest_keeps_what_it_has(
    contest: Callable[..., Any], runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = process.measure, itertools.count()

    def measure(*args: Any, **kwargs: Any) -> process.Outcome:
        if next(calls) == 2:  # after float32's answers and the first peer's round
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(process, "measure", measure)
    rows = contest(peer("one", runner, {}), peer("two", runner, {}))
    assert [(row["engine"], "ttft_s" in row, row["failed"]) for row in rows] == [
        *[("one", True, None)] * 2,
        *[("two", False, "interrupted")] * 2,
    ]


def test_exact_and_quantised_are_chosen_apart_and_a_gap_has_its_reason(
    contest: Callable[..., Any], runner: str
) -> None:
    one = peer("one", runner, {}, lacks={"quantised": "has none"})
    other = peer("other", runner, {}, exact=False)
    rows = contest(one, other, rounds=1)
    assert [(row["engine"], row["exact"], row["failed"]) for row in rows if row["prompt_tokens"] in (None, 20)] == [
        ("one", False, "has none"),
        ("one", True, None),
        ("other", False, None),
    ]
    by_kind = {row["exact"]: row["limit_s"] for row in rows if row["prompt_tokens"] == 20}
    assert by_kind[True] == pytest.approx(2 * by_kind[False]), "each against the rate of its own type"


def test_a_process_that_answers_nothing_has_failed() -> None:
    silent = process.run([sys.executable, "-c", "pass"], {}, limit_s=20, env={})
    assert silent == process.Outcome(None, "ended without an answer")
    assert "can't be started" in (process.run(["/no/such/program"], {}, limit_s=1, env={}).failed or "")


def test_busy_neighbours_are_told() -> None:
    program = [sys.executable, "-c", "import time; print({}); time.sleep(1)"]
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert process.run(program, {}, limit_s=20, env={}).elsewhere > 0.1
    finally:
        neighbour.kill()
        neighbour.wait()


def test_a_hung_process_takes_its_children_with_it(tmp_path: Path) -> None:
    sign = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(sign)!r}).touch()"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert process.run([sys.executable, "-c", program], {}, limit_s=1, env={}).failed == "no answer within 1 s"
    time.sleep(2)
    assert not sign.exists()


def test_a_process_that_is_ended_takes_away_what_it_was_writing(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from firstlight.core.files import write_atomically\n"
    code += "with write_atomically(Path(sys.argv[1])): time.sleep(60)"
    hung = process.run([sys.executable, "-c", code, str(tmp_path / "x")], {}, limit_s=3, env=os.environ)
    assert hung.failed == "no answer within 3 s" and not list(tmp_path.iterdir())


@given(st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=2, max_size=6))
def test_reasons_name_no_folder(parts: list[str]) -> None:
    said = process.without_paths(f"can't open /{'/'.join(parts)}: denied")
    assert said == f"can't open {parts[-1]}: denied"


@given(st.integers(2, 3000), st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_prompts_have_their_length_and_other_beginnings(size: int, lengths: list[int]) -> None:
    text = list(range(size))
    prompts = host.Prompts(text)
    made = [prompts.next(length) for length in lengths]
    assert [len(ids) for ids in made] == lengths
    assert all(b == (a + 1) % size for ids in made for a, b in itertools.pairwise(ids))
    if size % 997:
        assert made[0][0] != prompts.next(5)[0] or len(made) % size == 0


@given(st.integers(100, 3000), st.integers(0, 64), st.integers(1, 96))
def test_questions_are_windows_of_the_text(size: int, count: int, length: int) -> None:
    asked = host.questions(list(range(size)), count, length)
    assert len(asked) == count and all(len(ids) == length for ids in asked)


def test_a_peer_gets_no_variable_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "GOMP_SPINCOUNT", "KEPT"):
        monkeypatch.setenv(name, "x")
    theirs = environments.environment(Recipe("p", "r", install=[["p"]]))
    assert "KEPT" in theirs and not theirs.keys() & {"PYTHONPATH", "GOMP_SPINCOUNT"}
    assert "PYTHONPATH" in environments.environment(Recipe("ours", "r"))


def test_every_peer_is_swept_over_what_it_has() -> None:
    known = {r.name: r for r in recipes(["llama.cpp", "openvino", "vllm", "transformers"], Options())}
    assert list(known) == ["firstlight", "llama.cpp", "openvino", "vllm", "transformers"]
    for recipe in known.values():
        assert len({(v.label, v.exact) for v in recipe.variants}) == len(recipe.variants)
        assert (process.RUNNERS / recipe.runner).is_file()
        missing = {
            kind
            for kind, exact in (("exact", True), ("quantised", False))
            if exact not in {v.exact for v in recipe.variants}
        }
        assert missing == recipe.lacks.keys(), "a table without this peer says why"
    llama = known["llama.cpp"].variants
    assert {v.file for v in llama} == {"BF16", "shipped", "Q4_0", "Q8_0"}
    assert {(v.settings["flash"], v.settings["ubatch"]) for v in llama} == {
        (f, u) for f in (True, False) for u in (512, 2048, 0)
    }
    with pytest.raises(UserError, match="no peer is known as 'lama'"):
        recipes(["lama"], Options())


@pytest.mark.parametrize(("has", "openvino", "vllm"), [(True, "bf16", "bfloat16"), (False, "f32", "float32")])
def test_exact_peers_compute_in_what_the_processor_multiplies(
    has: bool, openvino: str, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that emulates bf16 is 30 times as slow as it can be."""
    monkeypatch.setattr("firstlight.evaluate.peers.recipes.has_bf16_products", lambda: has)
    ov, vl, tf = recipes(["openvino", "vllm", "transformers"], Options())[1:]
    assert {v.settings.get("precision") for v in ov.variants if v.exact} == {openvino}
    assert {v.settings.get("dtype") for v in (*vl.variants, *tf.variants) if v.exact} == {vllm}


def test_our_own_variants_follow_the_options() -> None:
    options = Options(threads=2, method=["band:window=64"])
    variants = ours("firstlight", options).variants
    assert [v.settings["precision"] for v in variants] == [p for p in ("bf16", "int8") if p in PRECISIONS]
    assert all(v.settings["method"] == ["band:window=64"] and v.settings["threads"] == 2 for v in variants)
    assert ours("firstlight-f32", Options()).variants[0].settings == {"precision": "f32"}
    assert ours("firstlight-deterministic", Options()).variants[0].settings["deterministic"] is True


def test_the_runners_need_nothing_but_their_peer() -> None:
    """Each is read by another environment's Python, where our package is not."""
    for file in sorted(process.RUNNERS.glob("*.py")):
        lines = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        modules = {line.split()[1].split(".")[0] for line in lines} - {"__future__"}
        assert modules <= sys.stdlib_module_names, f"{file.name} imports {modules} before it is asked to"


def test_the_results_are_lines_that_say_everything(tmp_path: Path) -> None:
    from firstlight.cli.contest import append

    found = {"machine": {"cpu": "c"}, "rows": [{"model": "m", "engine": "e"}, {"model": "m", "engine": "f"}]}
    append(tmp_path / "a" / "r.jsonl", found)
    append(tmp_path / "a" / "r.jsonl", found)
    lines = [json.loads(line) for line in (tmp_path / "a" / "r.jsonl").read_text().splitlines()]
    assert [line["engine"] for line in lines] == ["e", "f", "e", "f"]
    assert all(line["machine"] == {"cpu": "c"} and line["date"] for line in lines)
    with pytest.raises(UserError, match="can't be written"):
        append(tmp_path / "a" / "r.jsonl" / "x", found)


def test_the_host_keeps_what_engines_print_out_of_its_answer(tmp_path: Path, runner: str) -> None:
    job = {
        "settings": {},
        "text": [1, 2, 3, 4],
        "lengths": [5],
        "tokens": 1,
        "repeat": 1,
        "questions": (2, 2),
        "limit_s": 9,
    }
    outcome = process.measure(Path(sys.executable), runner, job, limit_s=20, env={})
    assert outcome.failed is None and outcome.answer is not None
    assert outcome.answer["answers"] == [1, 2] and outcome.answer["rss_mb"] > 1
    assert outcome.answer["lengths"].keys() == {"5"}
