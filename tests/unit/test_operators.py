"""`firstlight bench kernel`: which operators it measures, and what it says about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firstlight.cli.main import call
from firstlight.core.errors import UserError
from firstlight.evaluate import operators, peak
from tests.tiny import save_tiny_chat, tiny_config

PEAKS = {"bf16": 100.0, "int8": 200.0, "memory read": 10.0}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SECONDS", 0.0005)
    monkeypatch.setattr(operators, "_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(peak, "SIZE", 64)
    monkeypatch.setattr(peak, "READ_BYTES", 1 << 16)


def test_every_operator_of_a_layer_is_there() -> None:
    rows = list(operators.measure_operators(tiny_config(), [1, 5], 130, PEAKS))
    found = {(row["operator"], row["precision"], row["rows"]) for row in rows}
    assert len(found) == len(rows)
    for n in (1, 5):
        assert {(name, "bf16", n) for name in ("linear qkv", "linear head", "add_norm", "silu_mul", "rotate")} <= found
    assert {row["rows"] for row in rows if row["operator"] == "attention"} == {1, 130}
    assert all(row["seconds"] > 0 and row["torch_s"] > 0 and row["limit_s"] > 0 for row in rows)


def test_the_limit_is_that_of_memory_or_of_products() -> None:
    rows = {
        (row["operator"], row["rows"]): row["limit_s"]
        for row in operators.measure_operators(tiny_config(), [1, 600], 64, PEAKS)
        if row["precision"] == "bf16"
    }
    c = tiny_config()
    weights = c.vocab_size * c.hidden_size
    assert rows["linear head", 1] == pytest.approx((2 * weights + 2 * c.hidden_size + 2 * c.vocab_size) / 10e9)
    assert rows["linear head", 600] == pytest.approx(2 * 600 * weights / 100e9)


def test_the_table_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_tiny_chat(tmp_path))
    assert call(["bench", "kernel", folder, "--rows", "1", "--context", "70", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"machine", "peaks", "rows"} == found.keys() and found["machine"]["threads"] >= 1
    assert call(["bench", "kernel", folder, "--rows", "1", "--context", "70"]) == 0
    assert "silu_mul" in capsys.readouterr().out


def test_no_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="1 or more"):
        next(operators.measure_operators(tiny_config(), [0], 64, PEAKS))
