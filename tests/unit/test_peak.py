"""The machine's limit: what is measured, and the time that follows from it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlight.cli.main import call
from firstlight.evaluate import peak
from tests.tiny import tiny_config


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SIZE", 64)
    monkeypatch.setattr(peak, "READ_BYTES", 1 << 16)


def test_every_type_and_thread_count_has_a_rate() -> None:
    before = torch.get_num_threads()
    rows = peak.measure_peaks([1, 2])
    assert [(row["what"], row["threads"]) for row in rows] == [
        (what, threads) for threads in (1, 2) for what in ("f32", "bf16", "int8", "memory read")
    ]
    assert all(row["steady"] >= row["first_call"] >= 0 and row["steady"] > 0 and row["operator"] for row in rows)
    assert torch.get_num_threads() == before


def test_bench_peak_says_which_machine_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", "peak", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"cpu", "isa", "cores", "kernels"} <= found["machine"].keys() and len(found["rows"]) >= 4
    assert call(["bench", "peak"]) == 0
    assert "memory read" in capsys.readouterr().out


def test_a_peer_that_nobody_knows_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", "ttft", "m", "--against", "llama"]) == 2
    assert "known peers: llama.cpp, openvino" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "mlp"), [("llama", 3 * 192), ("gemma3", 3 * 192), ("qwen3_moe", 2 * 3 * 64 + 5)])
def test_the_operations_of_a_prefill_counted_one_by_one(family: str, mlp: int) -> None:
    config, n = tiny_config(3, family), 107
    rows, q, kv = n * config.num_layers, 96, 32
    linears = 2 * rows * (96 * (q + kv + kv) + q * 96 + 96 * mlp)
    pairs = sum(min(position + 1, window or n) for position in range(n) for window in config.windows)
    attention = pairs * config.num_heads * (2 * config.head_dim + 2 * config.head_dim)
    head = 2 * 96 * config.vocab_size
    assert peak.prefill_flops(config, n) == linears + attention + head


@given(st.integers(1, 8000), st.floats(1, 1e5))
def test_the_limit_falls_with_the_rate_and_grows_faster_than_the_prompt(tokens: int, gflops: float) -> None:
    config = tiny_config()
    limit = peak.limit_s(config, tokens, gflops)
    assert limit == pytest.approx(2 * peak.limit_s(config, tokens, 2 * gflops))
    body = limit - peak.limit_s(config, 0, gflops)
    assert peak.limit_s(config, 2 * tokens, gflops) - peak.limit_s(config, 0, gflops) > 2 * body
