"""`firstlight eval` on a tiny random model: planted methods get the figures they deserve, and nothing is run twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firstlight.cli.main import call
from firstlight.core import files, registry
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, Cut, Keep, Retention, RowPolicy
from firstlight.core.request import Request, SamplingParams
from firstlight.evaluate import books, grid, reading, reference, settings
from firstlight.evaluate.grid import Grid, evaluate
from tests.tiny import VOCABULARY, save_tiny, tiny_engine

LENGTH = 320


@dataclass(frozen=True)
class NoSettings:
    """None."""


class Forgetful(Retention):
    """Exact in the prompt; then all but the last entries are gone."""

    Config, capability = NoSettings, Capability()

    def __init__(self, config: NoSettings) -> None: ...

    def after_layer(self, layer: int, tok: Any, length: Sequence[int], obs: Any, ctx: Any) -> Keep:
        return Keep([torch.arange(max(n - 4, 0), n) for n in length])


class Thin(RowPolicy):
    """Only every second row goes through the last layer."""

    Config, capability = NoSettings, Capability(prefix_stable=False, last_rows=32)

    def __init__(self, config: NoSettings) -> None: ...

    def after_attend(self, layer: int, rows: Any, obs: Any, ctx: Any) -> Cut | None:
        return None if layer or ctx.decode else Cut(keep=rows.tok[rows.tok % 2 == 0])


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods above, and a truncated reader that fits a short prompt."""
    mine = {"forgetful": {"cache": Forgetful}, "thin": {"tokens": Thin}}
    entries = {name: {seam: SimpleNamespace(load=lambda c=c: c) for seam, c in p.items()} for name, p in mine.items()}
    known = {**registry._entries(), **entries}
    monkeypatch.setattr(registry, "_entries", lambda: known)
    monkeypatch.setattr(reading, "TRUNCATED", 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "results.jsonl"


@pytest.fixture
def measured(model: str, results: Path) -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    """Rows of the settings asked for (dense's are under `dense`), by task and place."""

    def measure(*method: str, names: str = "agreement,perplexity", **options: Any) -> Any:
        given = Options(**{"method": method, "precision": "f32", "threads": 1, **options})
        found = evaluate(model, given, Grid(names.split(","), [LENGTH]), out=results)["rows"]
        own = {(r["task"], r["at"]): r for r in found if r["name"] == settings.name_of(given)}
        dense = {(r["task"], r["at"]): r for r in found if r["name"] == "dense"}
        return {**own, "dense": dense}

    return measure


def test_a_perfect_method_is_perfect(measured: Any) -> None:
    rows = measured("band:window=100000")
    for at, samples in (("prompt", 3 * 320), ("continuation", 3 * 128)):
        agreement, perplexity = rows["agreement", at], rows["perplexity", at]
        assert agreement["score"] == agreement["top1"] == 1.0 and agreement["samples"] == samples
        assert abs(agreement["kl"]) < 1e-5
        assert perplexity["score"] == pytest.approx(perplexity["reference"], rel=1e-4)
        assert agreement["density"] == 1.0 and agreement["ttft_s"] > 0


def test_dense_bf16_stands_beside_with_figures_of_its_own(measured: Any) -> None:
    dense = measured("band:window=100000")["dense"]["agreement", "prompt"]
    assert 0 < dense["kl"] < 0.05 and 0.9 < dense["score"] <= 1.0
    assert dense["against_dense"] is None


def test_a_useless_method_is_found_out(measured: Any) -> None:
    rows = measured("band:sink=0,window=1")
    for at in ("prompt", "continuation"):
        row = rows["agreement", at]
        dense = rows["dense"]["agreement", at]
        assert row["kl"] > 10 * dense["kl"] and row["score"] < 0.8
        assert row["against_dense"]["high"] < 0
    assert rows["agreement", "prompt"]["density"] < 0.02


def test_the_continuation_sees_damage_that_the_prompt_does_not(measured: Any) -> None:
    rows = measured("forgetful")
    assert abs(rows["agreement", "prompt"]["kl"]) < 1e-5 and rows["agreement", "prompt"]["score"] == 1.0
    continuation = rows["agreement", "continuation"]
    assert continuation["kl"] > 10 * rows["dense"]["agreement", "continuation"]["kl"] and continuation["score"] < 0.98


def test_rows_that_a_method_drops_or_probes_with_are_told_apart(measured: Any) -> None:
    rows = measured("thin", names="agreement")
    # The last row of a prompt always goes on.
    assert rows["agreement", "prompt"]["samples"] == 3 * (LENGTH - 32) // 2
    assert rows["agreement", "probe_rows"]["samples"] == 3 * (32 // 2 + 1)
    assert rows["agreement", "continuation"]["samples"] == 3 * 128
    assert rows["agreement", "prompt"]["against_dense"] is None


def test_a_shortened_prompt_has_needles_but_no_rows_to_compare(model: str) -> None:
    given = Options(method=["truncate:rate=0.25"], precision="f32", threads=1)
    with pytest.raises(UserError, match="agreement and perplexity compare row by row, and truncate takes rows out"):
        evaluate(model, given, Grid(["agreement", "perplexity"], [LENGTH]))
    rows = evaluate(model, given, Grid(["niah_single_1"], [1200], 1))["rows"]
    told = {row["name"]: row["methods"] for row in rows}
    assert told["dense"] == [] and told["truncate:rate=0.25 + f32"][0]["rate"] == pytest.approx(0.25, abs=0.01)


def test_forced_rows_have_the_logits_of_a_prompt_that_holds_them() -> None:
    engine, ids = tiny_engine(prefix_cache="off"), [n * 37 % VOCABULARY for n in range(260)]
    whole, forced = {}, {}
    sampling = SamplingParams(max_tokens=1)
    sink = lambda tok, logits: whole.update(zip(tok.tolist(), logits.clone()))  # noqa: E731
    engine.add(Request("whole", ids, sampling, logits_at=range(199, 260), logits_sink=sink))

    def choose(generated: Sequence[int], logits: torch.Tensor) -> int:
        forced[199 + len(generated)] = logits.clone()
        return ids[200 + len(generated)]

    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    live = engine.add(Request("forced", ids[:200], sampling, choose=choose))
    while engine.has_work:
        engine.step()
    assert live.ids == ids and forced.keys() == set(range(199, 259))
    assert all(torch.allclose(forced[at], whole[at], atol=1e-3) for at in forced)


def logits_of(ids: list[int]) -> torch.Tensor:
    """Logits [T, vocabulary] of a prompt, plainly."""
    engine, rows = tiny_engine(prefix_cache="off"), []
    sink = lambda tok, logits: rows.append(logits.clone())  # noqa: E731
    engine.add(Request("r", ids, SamplingParams(max_tokens=1), logits_at="all", logits_sink=sink))
    while engine.has_work:
        engine.step()
    return torch.cat(rows)


def test_a_reference_is_what_plain_prompts_say() -> None:
    what = reading.Excerpt("", [n * 37 % VOCABULARY for n in range(300 + reading.CONTINUATION + 1)], 300, 0)
    made = reading.refer(tiny_engine(prefix_cache="off"), what)
    said = logits_of(what.ids).log_softmax(-1)
    assert torch.equal(made.outline.ids[:, 0].long(), said[what.rows].argmax(-1))
    assert torch.allclose(made.outline.logp[:, 0], said[what.rows].max(-1).values, atol=1e-3)
    labels = torch.tensor(what.ids)[what.rows + 1]
    assert torch.allclose(-made.nll.float(), said[what.rows].gather(-1, labels[:, None])[:, 0], atol=1e-3)
    spans = [*what.windows, range(300, 428)]
    assert [span.stop <= 128 for span in spans] == [
        bool(made.nll_truncated[what.rows == span.start].isnan()) for span in spans
    ]
    for span in spans:
        if span.stop > 128:
            short = logits_of(what.ids[span.stop - 128 : span.stop]).log_softmax(-1)[-len(span) :]
            want = short.gather(-1, torch.tensor(what.ids)[span.start + 1 : span.stop + 1, None])[:, 0]
            inside = (what.rows >= span.start) & (what.rows < span.stop)
            assert torch.allclose(-made.nll_truncated[inside].float(), want, atol=1e-3)


def test_windows_are_disjoint_and_span_the_prompt() -> None:
    for length, count in [(64, 1), (130, 2), (1023, 15), (1024, 16), (8000, 16)]:
        what = reading.Excerpt("", [], length, 0)
        assert len(what.windows) == count and (what.windows[0].start, what.windows[-1].stop) in [(0, length), (0, 64)]
        assert len(set(what.rows.tolist())) == len(what.rows) == count * 64 + 128
        assert what.rows.tolist() == sorted(what.rows.tolist())


def test_nothing_is_run_twice(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    real_compare, real_read = reading.compare, reading.read
    monkeypatch.setattr(reading, "compare", lambda *given: runs.append("cell") or real_compare(*given))
    monkeypatch.setattr(reading, "read", lambda *given: runs.append("read") or real_read(*given))
    out, one = tmp_path / "results.jsonl", Options(threads=1, method=("band:window=64",))
    first = evaluate(model, one, Grid(["agreement"], [128], 2), out=out)
    assert runs.count("cell") == 4
    lines = out.read_text()
    runs.clear()
    assert evaluate(model, one, Grid(["agreement"], [128], 2), out=out) == first and runs == []
    # A line that was cut off is run again, and a second method finds dense and the reference there.
    out.write_text(lines[:-30])
    assert evaluate(model, one, Grid(["agreement"], [128], 2), out=out)["rows"][0] == first["rows"][0]
    assert runs == ["cell", "read"] and out.read_text().count("\n") == 4
    runs.clear()
    evaluate(model, Options(threads=1, method=("band:window=32",)), Grid(["perplexity"], [128], 2), out=out)
    assert runs == ["cell", "read"] * 2


def test_an_interrupt_keeps_what_is_finished(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = reading.compare, iter(range(100))

    def stops_at_the_third(*given: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(reading, "compare", stops_at_the_third)
    out = tmp_path / "results.jsonl"
    line = ["eval", model, "--tasks", "agreement", "--lengths", "128", "--threads", "1", "--out", str(out)]
    assert call(line) == 130
    assert out.read_text().count("\n") == 2


def test_json_and_table(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", model, "--tasks", "agreement,perplexity,niah_single_1", "--lengths", "1024", "--samples", "1"]
    line += ["--method", "band:window=64", "--threads", "1", "--out", str(tmp_path / "results.jsonl")]
    assert call([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"machine", "model", "rows", "texts"} <= found.keys() and len(found["texts"]) == 3
    keys = {"task", "length", "settings", "score", "low", "high", "samples", "ttft_s", "density", "kl", "top1"}
    assert all(keys <= row.keys() for row in found["rows"])
    assert {row["task"] for row in found["rows"]} == {"agreement", "perplexity", "niah_single_1"}
    # A random model finds no needle, so no method is judged by it.
    judged = [row for row in found["rows"] if row["task"] == "niah_single_1"]
    assert [row.get("note") for row in judged] == [None, None, "n/a: dense finds 0 of 1", "n/a: dense finds 0 of 1"]
    assert call(line) == 0
    lines = capsys.readouterr().out.split("\n")
    assert "agreement, prompt, 1024 tokens (n 1024)" in [line.strip() for line in lines] and max(map(len, lines)) <= 80
    assert sum("dense finds 0 of 1" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--tasks", "nothing"], "no task is called 'nothing'; choose one of: agreement, perplexity, context_gain"),
        (["--lengths", "2000"], "a prompt of 2000 tokens takes 2129 with what follows it, the model's limit is 2048"),
        (["--lengths", "99999999"], "99999999 tokens are beyond the model's limit of 2048; give shorter --lengths"),
        (["--lengths", "512", "--max-model-len", "600"], "the model's limit is 600; give --lengths up to 471"),
        (["--lengths", "many"], "can't read the lengths 'many'"),
        (["--lengths", "0"], "give 1 or more"),
        (["--lengths", "30"], "30 tokens are too few to read"),
        (["--samples", "0"], "give 1 or more"),
        (["--samples", "5000"], "excerpts of 256 tokens; give fewer --samples"),
        (["--tasks", "niah_single_1", "--lengths", "200"], "200 tokens are too few for this task"),
        (["--method", "nothing"], "no method is called 'nothing'"),
        (["--against", "nothing + int8"], "no method is called 'nothing'"),
        (["--against", "f32 + int8"], "can't read the setting 'f32 + int8'; write it like band:window=512 + int8"),
        (["--against", "truncate:rate=0.5"], "compare row by row, and truncate takes rows out"),
        (["--placements", "last,middle"], "questions stand in last, first, tail"),
        (["--tasks", "recall", "--method", "truncate"], "recall compare row by row"),
        (["--tasks", "recall", "--against", "forgetful"], "recall is measured on planners alone, and forgetful does"),
        (["--out", "{tmp}"], "can't write"),
        (["--out", "{tmp}/notes.txt"], "holds something else than results of firstlight eval"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_run(
    line: list[str], said: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(grid, "LLM", None)
    (tmp_path / "notes.txt").write_text("my notes")
    given = [part.format(tmp=tmp_path) for part in line]
    assert call(["eval", model, *([] if "--lengths" in line else ["--lengths", "256"]), *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "my notes"


@pytest.mark.parametrize("task", ["agreement", "niah_single_2", "qa_2"])
def test_a_task_without_its_text_is_one_line(
    task: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    books.text_of.cache_clear()
    reading._book_ids.cache_clear()
    monkeypatch.setattr(books, "shipped", lambda name: files.shipped(f"{name}.gone"))
    monkeypatch.setattr(grid, "LLM", None)
    assert call(["eval", model, "--tasks", task, "--lengths", "512"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "gone is missing from this installation" in err and err.count("\n") == 1


def test_settings_and_their_controls_stand_side_by_side(model: str, tmp_path: Path) -> None:
    given = Options(method=("band:sink=0,window=128",), threads=1)
    others = [settings.setting_of(given, text) for text in ("band:window=100000", "band:sink=0,window=1")]
    asked, out = Grid(["recall", "agreement", "niah_single_1"], [1024], 1), tmp_path / "results.jsonl"
    found = evaluate(model, given, asked, against=others, with_controls=True, out=out)["rows"]
    by_task = {task: {r["name"]: r for r in found if r["task"] == task} for task in asked.tasks}
    recall, agreement, needles = by_task.values()
    assert recall["band:window=100000"]["score"] == pytest.approx(1.0) and recall["dense"]["error"] < 1e-5
    assert recall["band:sink=0,window=1"]["score"] < 0.1 < 0.5 < recall["band:sink=0,window=1"]["error"]
    band, name = recall["band:sink=0,window=128"], "band:sink=0,window=128"
    assert band["density"] == pytest.approx(agreement[name]["density"], abs=1e-3)
    assert len(band["layers"]) == 2 and len(band["layers"][0]["heads"]) == 4 and band["ttft_s"] is None
    assert recall["band:sink=64,window=64"]["density"] == pytest.approx(band["density"], abs=0.03)
    words = {name.partition(":")[0] for name in needles}
    assert {"dense + f32", "truncate", "bm25"} <= words and "truncate" not in {n.partition(":")[0] for n in agreement}
    assert evaluate(model, given, asked, against=others, with_controls=True, out=out)["rows"] == found


def test_a_missing_cache_folder_is_no_obstacle(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "file"))
    rows = evaluate(model, Options(threads=1), Grid(["agreement"], [64], 1))["rows"]
    assert rows[0]["samples"] == 64


def test_the_reference_folder_is_bounded(tmp_path: Path) -> None:
    for age, name in enumerate("abcd"):
        path = tmp_path / f"{name}.st"
        path.write_bytes(bytes(100))
        os.utime(path, (age, age))
    reference._forget(tmp_path, 250, spare=tmp_path / "a.st")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.st", "d.st"]


def test_a_real_model(smollm2_path: Path) -> None:
    given = Options(method=("band:sink=0,window=16",))
    rows = evaluate(str(smollm2_path), given, Grid(["agreement", "perplexity"], [128], 1))["rows"]
    dense, band = (row for row in rows if row["task"] == "agreement" and row["at"] == "continuation")
    assert dense["kl"] < 0.02 and dense["score"] > 0.9
    assert band["kl"] > 0.1 and band["score"] < dense["score"]
    with pytest.raises(UserError, match="give --lengths up to 8063"):
        evaluate(str(smollm2_path), given, Grid(["agreement"], [8192], 1))
