"""`firstlight bench kernel`: which operators it measures, and what it says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlight.cli.main import call
from firstlight.core.errors import UserError
from firstlight.evaluate import operators, peak
from firstlight.kernels.native import lib
from firstlight.models.weights.checkpoint import tensor_shapes
from tests.tiny import save_tiny_chat, tiny_config

PEAKS = {"bf16": 100.0, "int8": 200.0, "memory read": 10.0}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SECONDS", 0.0005)
    monkeypatch.setattr(operators, "_COLD_BYTES", 1 << 16)
    monkeypatch.setattr(peak, "SIZE", 64)
    monkeypatch.setattr(peak, "READ_BYTES", 1 << 16)


def types(**of: str) -> dict[str, str]:
    """The tiny model's tensors as a file might have them."""
    kinds = {"q_proj": "Q4_1", "k_proj": "Q4_1", "v_proj": "Q5_0", "down_proj": "F16"} | of
    names = tensor_shapes(tiny_config())
    return {name: kinds.get(name.split(".")[-2], "Q4_0") for name in names}


def measured(**how: Any) -> dict[tuple[Any, ...], dict[str, Any]]:
    given = {"config": tiny_config(), "rows": [1, 5], "context": 130, "peaks": PEAKS} | how
    rows = list(operators.measure_operators(**given))
    found = {(row["operator"], row["precision"], row["blocks"], row["rows"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_operator_of_a_layer_is_there() -> None:
    found = measured()
    for n in (1, 5):
        names = ("linear qkv", "linear head", "add_norm", "silu_mul", "rotate")
        assert {(name, "bf16", "", n) for name in names} <= found.keys()
    kinds = {"bf16", "int8"} if torch.cpu._is_vnni_supported() else {"bf16"}
    attention = {key[1::2] for key in found if key[0] == "attention"}
    assert attention == {(kind, n) for kind in kinds for n in (1, 130)}
    assert all(row["seconds"] > 0 and row["limit_s"] > 0 for row in found.values())
    without = {key[:2] for key, row in found.items() if not row["torch_s"]}
    assert without == {("attention", "int8")} & {key[:2] for key in found}


@pytest.mark.skipif(lib is None, reason="no compiled kernels here: nothing computes from blocks")
def test_linears_compute_from_the_files_own_blocks() -> None:
    found = {key: row for key, row in measured(types=types()).items() if key[2]}
    assert {key[::2] for key in found} == {
        *(("linear qkv", "Q4_1+Q5_0"), ("linear o", "Q4_0"), ("linear gate_up", "Q4_0"), ("linear head", "Q4_0"))
    }
    assert {key[0] for key, row in found.items() if row["torch_s"] is None} == {"linear qkv"}
    c = tiny_config()
    blocks = c.vocab_size * c.hidden_size * 18 / 32  # bytes: as small as in the file
    head = found["linear head", "bf16", "Q4_0", 1]
    assert head["limit_s"] == pytest.approx((blocks + 2 * c.hidden_size + 2 * c.vocab_size) / 10e9)
    plain = measured(rows=[1], types=types(v_proj="F32", gate_proj="BF16"))
    assert {key[0] for key in plain if key[2]} == {"linear o", "linear head"}


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs VNNI")
def test_attention_in_8_bits_has_the_limit_of_bytes() -> None:
    c, n = tiny_config(), 640
    found = measured(rows=[1], context=n, peaks=PEAKS | {"memory read": 1.0})
    q = 4 * c.num_heads * c.head_dim
    read = {"int8": 2 * (c.head_dim + 4), "bf16": 4 * c.head_dim}
    for kind, each in read.items():
        assert found["attention", kind, "", 1]["limit_s"] == pytest.approx((n * c.num_kv_heads * each + q) / 1e9)
        work = found["attention", kind, "", n]["limit_s"] * PEAKS[kind] * 1e9
        assert work == pytest.approx(4 * c.num_heads * c.head_dim * n * (n + 1) / 2)


def test_the_limit_is_that_of_memory_or_of_products() -> None:
    rows = {
        (row["operator"], row["rows"]): row["limit_s"]
        for row in operators.measure_operators(tiny_config(), [1, 600], 64, PEAKS)
        if row["precision"] == "bf16" and not row["blocks"]
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
