"""The picture of a contest's rows: well-formed, every engine at its best, what is missing named."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from firstlight.cli import docs

SPEC = importlib.util.spec_from_file_location("picture", docs.checkout() / "benchmarks" / "picture.py")
assert SPEC is not None and SPEC.loader is not None
drawing = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(drawing)
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


def test_it_is_svg_and_holds_both_kinds_and_what_is_missing() -> None:
    rows = [row(e, n, n / 500, exact) for e in ("a", "b") for n in (512, 8000) for exact in (True, False)]
    text = drawing.picture("m", [*rows, failed("c", "crashed: SIGSEGV <core>"), failed("a", "in one setting")])
    root = ElementTree.fromstring(text)
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 4 + 2, "four engines and two limits"
    assert {e.get("stroke") for e in lines} == set(drawing.COLOURS.values())
    said = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert "no exact figure of c: crashed: SIGSEGV <core>" in said
    assert not [s for s in said if "in one setting" in s], "another setting of it is drawn"
    for line in lines:
        for point in (line.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert drawing.LEFT <= x <= drawing.WIDTH and drawing.TOP <= y <= drawing.HEIGHT - drawing.BOTTOM


def test_nothing_measured_is_said() -> None:
    with pytest.raises(SystemExit, match="no engine was measured"):
        drawing.picture("m", [failed("a", "why")])
