"""The picture of a contest's rows: well-formed, every engine at its best, what is missing named."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from firstlight.cli import docs

sys.path.insert(0, str(docs.checkout() / "benchmarks"))
import frontier
import picture as drawing
import quality

MACHINE = {"cpu": "A & B", "isa": "avx2", "threads": 2, "commit": None}


def row(engine: str, length: int, seconds: float, exact: bool = True, **about: Any) -> dict[str, Any]:
    figures = {"ttft_s": {"median": seconds}, "limit_s": length / 1000, "prompt_tokens": length}
    about = {"date": "1", "settings": {}, "failed": None, **about}
    return {"model": "m", "machine": MACHINE, "engine": engine, "exact": exact, **figures, **about}


def failed(engine: str, why: str, exact: bool = True) -> dict[str, Any]:
    about = {"model": "m", "machine": MACHINE, "date": "1", "settings": {}, "prompt_tokens": None}
    return {**about, "engine": engine, "exact": exact, "failed": why}


def test_the_best_setting_of_the_latest_run() -> None:
    rows = [row("e", 512, 9.0), row("e", 512, 2.0, date="2"), row("e", 512, 3.0, date="2"), row("e", 2048, 8.0)]
    assert drawing.best_of(rows) == {("e", True): [(512, 2.0), (2048, 8.0)]}
    assert drawing.limits_of([*rows, row("f", 512, 1.0, settings={"precision": "f32"}, limit_s=99.0)]) == {
        True: [(512, 0.512), (2048, 2.048)]
    }


def test_it_is_svg_with_a_panel_of_each_kind_and_what_is_missing() -> None:
    rows = [row(e, n, n / 500, exact) for e in ("a", "b") for n in (512, 8000) for exact in (True, False)]
    text = drawing.picture("m", [*rows, failed("c", "crashed: SIGSEGV <core>"), failed("a", "in one setting")])
    root = ElementTree.fromstring(text)
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 4 + 2, "four engines and two limits"
    said = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert sum(s == "limit 8 s" for s in said) == 2 and sum(s == "a 16 s" for s in said) == 2
    assert "no exact figure of c: crashed: SIGSEGV <core>" in said
    assert not [s for s in said if "in one setting" in s], "another setting of it is drawn"
    places = {colour: [] for colour in drawing.COLOURS.values()}
    for line in lines:
        for point in (line.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert drawing.TOP <= y <= drawing.HEIGHT - drawing.BOTTOM
            places.get(line.get("stroke") or "", []).append(x)
    exact, quantised = places.values()
    assert len(exact) == len(quantised) == 4 and max(exact) < min(quantised), "never in one panel"


def test_names_never_stand_on_each_other() -> None:
    moved = drawing.apart({"a": 100.0, "b": 98.0, "c": 97.0, "d": 20.0}, 15)
    assert moved == {"a": 100.0, "b": 85.0, "c": 70.0, "d": 20.0}


def test_nothing_measured_is_said() -> None:
    with pytest.raises(SystemExit, match="no engine was measured"):
        drawing.picture("m", [failed("a", "why")])


def schedule(name: str, ttft: float, p99: float, urgent: float | None = None, **about: Any) -> dict[str, Any]:
    figures = {"ttft_s": {"median": ttft}, "ttft_alone_s": 1.0, "itl_s": {"p99": p99}, "itl_alone_s": {"p50": 0.01}}
    late = None if urgent is None else {"over_s": {"p95": urgent}}
    scene = {"streams": 4, "stream_tokens": 256, "prompt_tokens": 8000, "exact": True}
    return {"model": "m", "machine": MACHINE, "schedule": name, "urgent": late, **figures, **scene, **about}


def test_the_frontier_joins_whom_nobody_beats() -> None:
    old, other = schedule("a", 9.0, 9.0), schedule("gone", 0.1, 0.1, prompt_tokens=9)
    rows = [old, other, schedule("a", 2.0, 0.5, 0.03), schedule("b", 5.0, 0.05), schedule("c", 6.0, 0.6)]
    root = ElementTree.fromstring(frontier.frontier("m", rows))
    (line,) = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len((line.get("points") or "").split()) == 2
    colours = [e.get("fill") for e in root.iter() if e.tag.endswith("circle")]
    assert colours == [frontier.FRONT, frontier.FRONT, frontier.BEATEN]
    said = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert "2.00 s, 500 ms, urgent +30 ms (p95)" in said and "1  a" in said and not [s for s in said if "gone" in s]
    assert "8,000 tokens arrive beside 4 streams: m" in " ".join(said)


def judged(name: str, ttft: float | None, score: float | None, task: str = "niah_single_2") -> dict[str, Any]:
    around = {"low": score and score - 0.1, "high": score and score + 0.1, "density": 0.3, "samples": 10}
    return {"task": task, "at": "last", "length": 4096, "name": name, "ttft_s": ttft, "score": score, **around}


def test_quality_over_time_joins_whom_nobody_beats() -> None:
    rows = [judged("dense", 4.0, 1.0), judged("quick & good", 2.0, 0.9), judged("quick", 1.9, 0.4)]
    rows += [judged("slow", 5.0, 0.9), judged("n/a", 1.0, None), judged("untimed", None, 0.9, "recall")]
    (cell,) = quality.cells(rows).values()
    assert quality.front(cell) == [True, True, True, False] and len(cell) == 4
    root = ElementTree.fromstring(quality.quality("models/m.gguf", MACHINE, cell))
    (line,) = [e for e in root.iter() if e.tag.endswith("polyline")]
    places = [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]
    assert places == sorted(places) and [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert all(drawing.TOP <= y <= drawing.HEIGHT - drawing.BOTTOM for _, y in places)
    said = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert "2  quick & good" in said and "0.9 [0.8, 1], 2.00 s, density 0.30" in said
    assert quality.front([judged("a", 1.0, 9.0, "perplexity"), judged("b", 1.0, 8.0, "perplexity")]) == [False, True]
