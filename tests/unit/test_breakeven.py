"""When shortening pays: curves beside plain sums, the length from which it does, and what a compressor makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlight.core import calibration
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts, PromptEdit, PromptIds
from firstlight.core.registry import Method, make_parts
from firstlight.prompt.breakeven import MARGIN, Curves
from firstlight.train.llmlingua import RATES, Config, fit, positive

FACTS = ModelFacts("a" * 64, 8, 4, 2, 16, (None,) * 8, machine="this one", max_len=8192)
TERM = st.floats(0, 1e-3)
CURVES = st.builds(
    Curves,
    prefill=st.tuples(st.floats(0, 1), TERM, st.floats(0, 1e-6)),
    step=st.tuples(st.floats(0, 0.1), st.floats(0, 1e-5)),
    shorten=st.tuples(st.floats(0, 1), TERM, TERM, st.floats(0, 1e-6)),
)


def test_the_root_is_the_analytic_one() -> None:
    """Won time: 0.95 p n^2 - p n^2 / 4 - s n = 0 at n = s / 0.7 p; without a margin the card's c1 / (1 - r^2) a2."""
    curves = Curves(prefill=(0, 0, 1e-6), step=(0, 0), shorten=(0, 7e-4, 0, 0))
    assert curves.pays_from(0.5, 1, 8192) == 1000 + 1
    assert curves.pays_from(0.5, 1, 1000) is None
    assert not curves.pays(1000, 1000, 0.5, 1) and curves.pays(1001, 1001, 0.5, 1)
    linear = Curves(prefill=(0, 1e-3, 0), step=(0, 0), shorten=(0.09, 0, 0, 0))
    assert linear.pays_from(0.5, 1, 8192) == 200 + 1


@given(rate=st.floats(0.05, 0.95), a1=TERM, more=TERM)
def test_a_compressor_that_costs_a_prefill_never_pays(rate: float, a1: float, more: float) -> None:
    """No length if c1 >= a1 and a2 = 0; nor if it takes all that the prefill takes, as the whole model does."""
    assert Curves((0.1, a1, 0), (0, 0), (0, a1 + more, 0, 0)).pays_from(rate, 1, 1 << 20) is None
    assert Curves((0.1, a1, 1e-6), (0, 0), (0.1, a1, 0, 1e-6 / rate)).pays_from(rate, 1, 1 << 20) is None


@given(curves=CURVES, rate=st.floats(0.05, 0.99), generated=st.integers(0, 500))
def test_it_pays_nowhere_before_and_there(curves: Curves, rate: float, generated: int) -> None:
    longest = 3000
    first = curves.pays_from(rate, generated, longest)
    won = [
        (1 - MARGIN) * curves.whole(n, generated) - curves.shortened(n, n, rate, generated) for n in range(1, longest)
    ]
    assert all(w <= 1e-9 for w in won[: longest if first is None else first - 1])
    if first is not None and first < longest:
        assert won[first - 1] >= -1e-9


@given(curves=CURVES)
def test_times_are_sums_of_what_happens(curves: Curves) -> None:
    whole = sum(p * 300**i for i, p in enumerate(curves.prefill)) + 7 * (curves.step[0] + 300 * curves.step[1])
    assert curves.whole(300, 7) == pytest.approx(whole)
    spared = 100 * curves.prefill[1] + 100**2 * curves.prefill[2]
    assert curves.whole(300, 7, known=100) == pytest.approx(whole - spared)
    effort = curves.shorten[0] + 200 * (curves.shorten[1] + 0.25 * curves.shorten[2] + 50 * curves.shorten[3])
    assert curves.shortened(300, 200, 0.25, 7) == pytest.approx(effort + curves.whole(150, 7))


@given(curves=CURVES)
def test_curves_are_found_again(curves: Curves) -> None:
    lengths = [256, 512, 1024, 2048, 4096]
    curves = replace(curves, step=(curves.step[0] + 1e-3, curves.step[1]))
    whole = [curves.whole(n, 0) + 1e-9 for n in lengths]
    steps = [curves.step[0] + n * curves.step[1] for n in lengths]
    effort = [[curves.shortened(n, n, r, 0) - curves.whole(r * n, 0) + 1e-9 for r in RATES] for n in lengths]
    rows = [[p, s, *e] for p, s, e in zip(whole, steps, effort)]
    found = fit(lengths, torch.tensor(rows, dtype=torch.float64))
    for n in (256, 1000, 4096):
        assert found.whole(n, 9) == pytest.approx(curves.whole(n, 9), rel=1e-3, abs=1e-6)
        assert found.shortened(n, n, 0.5, 9) == pytest.approx(curves.shortened(n, n, 0.5, 9), rel=1e-3, abs=1e-6)


def test_no_term_is_negative_whatever_was_measured() -> None:
    n = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    parts = torch.stack([n**0, n, n**2], 1)
    falling = torch.tensor([4.0, 3, 2.5, 2], dtype=torch.float64)
    (a, b, c) = positive(parts, falling)
    weights = (1 / falling**2) / (1 / falling**2).sum()
    assert b == c == 0 and a == pytest.approx(float((weights * falling).sum()))


def editor(tmp_path: Path, facts: ModelFacts = FACTS, **settings: Any) -> Any:
    found = Calibration(
        "llmlingua",
        FACTS.digest,
        {"layers": "6", "segment": 200},
        {},
        {"machine": "this one", "prefill": [0, 0, 1e-6], "step": [0, 0], "shorten": [0, 7e-4, 0, 0]},
    )
    calibration.write(tmp_path / "file", found)
    (part,) = make_parts([Method("llmlingua", calibration=str(tmp_path / "file"), **settings)], facts)
    return part.impl


class Silent:
    """A scorer that must not be asked, or finds everything alike."""

    def __init__(self) -> None:
        self.calls = 0

    def nll(self, ids: Any, *, first: int = 0, layers: Any = None, among: Any = None) -> list[float]:
        self.calls += 1
        return [0.0] * (len(ids) - first)


def of(n: int, protected: int = 0) -> PromptIds:
    return PromptIds(list(range(n + protected)), [(0, n)], "", max_tokens=1)


def test_a_prompt_is_left_as_it_is_where_shortening_does_not_pay(tmp_path: Path) -> None:
    scorer, pays = Silent(), editor(tmp_path, when="pays")
    edit: PromptEdit = pays.edit(of(1000), scorer)
    assert list(edit.ids) == list(range(1000)) == list(edit.keep_map) and scorer.calls == 0
    assert edit.why == (
        "shortening doesn't pay: 0.95 s with it, 1 s without, for prompt and answer as measured; "
        "it does from 1,001 tokens on"
    )
    edit = pays.edit(of(1010), scorer)
    assert len(edit.ids) == 505 and edit.why == "" and scorer.calls > 0
    assert len(editor(tmp_path).edit(of(1000), scorer).ids) == 500
    assert "it never does on this model" in editor(tmp_path, when="pays", rate=0.99).edit(of(1000), scorer).why


def test_known_cells_are_no_reason_to_shorten(tmp_path: Path) -> None:
    scorer, pays = Silent(), editor(tmp_path, when="pays")
    assert len(pays.edit(replace(of(1200), known=64), scorer).ids) == 600
    edit = pays.edit(replace(of(1200), known=1024), Silent())
    assert list(edit.ids) == list(range(1200)) and "0.391 s without, 1,024 tokens being known," in edit.why


def test_rate_one_has_nothing_to_decide(tmp_path: Path) -> None:
    edit = editor(tmp_path, when="pays", rate=1).edit(of(30, 5), Silent())
    assert list(edit.ids) == list(range(35)) and edit.why == ""


@pytest.mark.parametrize(
    ("settings", "facts", "why"),
    [
        ({"layers": "all"}, FACTS, "is of layers=6,segment=200; make one with .*llmlingua:layers=all,segment=200"),
        ({}, replace(FACTS, machine="a laptop"), r"was made elsewhere \(this one; here: a laptop\)"),
        ({}, replace(FACTS, digest="b" * 64), "is of another model"),
    ],
)
def test_times_of_something_else_are_refused(
    settings: dict[str, Any], facts: ModelFacts, why: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why):
        editor(tmp_path, facts, when="pays", **settings)


def test_without_times_or_with_damaged_ones_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="there is none; make one with `firstlight calibrate MODEL llmlingua:layers=6"):
        make_parts([Method("llmlingua", when="pays")], FACTS)
    with pytest.raises(UserError, match="when='often' is out of range; choose always or pays"):
        make_parts([Method("llmlingua", when="often")], FACTS)
    editor(tmp_path)
    body = json.loads((tmp_path / "file").read_text())
    for wrong in ([1, 2], [0, -1, 0], [0, "1", 0], [0, 1e999, 0]):
        (tmp_path / "file").write_text(json.dumps(body | {"values": body["values"] | {"prefill": wrong}}))
        with pytest.raises(UserError, match="damaged"):
            make_parts([Method("llmlingua", when="pays", calibration=str(tmp_path / "file"))], FACTS)


def test_wrong_settings_of_the_procedure_are_one_line() -> None:
    with pytest.raises(UserError, match="length=100 is out of range"):
        Config(length=100)
    with pytest.raises(UserError, match="layers='some'"):
        Config(layers="some")
