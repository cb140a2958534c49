"""A model from the weight cache is the model itself, to the bit, and its weights aren't asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from answers import BF16, F32, VARIANTS, backend
from torch import Tensor

from firstlight.models.calibration import layers_of
from firstlight.models.decoder import Decoder
from firstlight.models.families import FAMILIES, build_model
from firstlight.models.weights.store import kept
from tests.tiny import tiny_config, tiny_weights


@pytest.mark.parametrize("name", ["torch", *VARIANTS[:1]])
@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "gemma3"])
def test_a_second_start_is_the_first(
    name: str, precision: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "int8" and (family == "qwen3_moe" or not torch.cpu._is_vnni_supported()):
        pytest.skip("experts of this size, or this processor, have no int8 products")
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path))
    ops, config = backend(name), replace(tiny_config(family=family), tie_head=family != "qwen2")
    weights = tiny_weights(F32 if precision == "f32" else BF16, family=family)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    spread: dict[str, Tensor] | None = {} if precision == "int8" else None
    made, kind = [], FAMILIES[config.architecture]

    def pieces() -> Iterator[tuple[str, Tensor]]:
        made.append(1)
        return kind.prepared(config, weights, ops, spread)

    def start() -> Decoder:
        found = kept("0" * 64, precision, pieces, expected=1)
        return kind(config, found, ops, int8=precision == "int8")

    want = outputs(build_model(config, weights, ops, spread))
    for _ in range(2):
        assert torch.equal(outputs(start()), want)
    assert made == [1]


def outputs(model: Decoder) -> Tensor:
    ids = torch.arange(20) % model.config.vocab_size
    queries = [q.float().flatten() for q, _, _ in layers_of(model, ids)]
    return torch.cat([*queries, model.head(model.embed(ids)).flatten()])
