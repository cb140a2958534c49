"""What holds of planners alike: without a common grid they are dense, and their defaults are the published ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from firstlight.attention import minference, trishape, xattention
from firstlight.attention.compactattention import CompactAttention, CompactConfig
from firstlight.attention.flexprefill import FlexPrefillConfig
from firstlight.attention.minference import MInferenceConfig
from firstlight.attention.oracle import Oracle, OracleConfig
from firstlight.attention.patterns import LEAST, LINES
from firstlight.attention.quoka import Quoka, QuokaConfig
from firstlight.attention.random import Random, RandomConfig
from firstlight.attention.trishape import TriShape, TriShapeConfig
from firstlight.attention.xattention import XAttention, XAttentionConfig
from firstlight.core.attn import Planner
from firstlight.kernels.kv_layout import BLOCK
from tests.unit.test_compactattention import SMALL, context


@pytest.mark.parametrize(
    "planner",
    [
        XAttention(XAttentionConfig(tau=0.5, stride=4, block=16)),
        CompactAttention(CompactConfig(alpha=1.0, **SMALL)),  # type: ignore[arg-type]
        Quoka(QuokaConfig(budget=16)),
        Oracle(OracleConfig(k=16)),
        Random(RandomConfig(block=16)),
        TriShape(TriShapeConfig(sink=32, window=64, mode="openvino")),
    ],
    ids=lambda planner: planner.name,
)
def test_heads_that_hold_different_entries_read_all(planner: Planner) -> None:
    """The same rows have a plan where all heads hold the same."""
    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(40, 6, 16, generator=generator), torch.randn(2, 296, 16, generator=generator)
    ctx = context(q, keys, 256)
    assert planner.plan(ctx) is not None and planner.plan(replace(ctx, place=None)) is None


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (
            FlexPrefillConfig(),
            {"gamma": 0.9, "tau": 0.1, "min_budget": 512, "max_budget": None, "block": 128, "slash_cover": "reference"},
        ),
        (XAttentionConfig(), {"stride": 8, "block": 128, "tau": None, "alternating": False}),
        (
            CompactConfig(),
            {"alpha": 0.06, "block": 128, "sinks": 2, "window": 4, "recent": 2, "dense": 2, "heads": 4, "chunk": 1024},
        ),
        (QuokaConfig(), {"queries": 16, "budget": 1024, "pool": 1, "sink": 0}),
        (TriShapeConfig(), {"sink": 128, "window": 1920, "tail": 100, "block": 32}),
        (MInferenceConfig(), {"exact": False, "budget": 1.0}),
        (OracleConfig(), {"k": 1024, "rows": 1, "block": 1, "heads": "layer", "pool": "mean"}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_defaults_are_the_published_ones(config: Any, published: dict[str, Any]) -> None:
    assert {key: getattr(config, key) for key in published} == published


def test_constants_are_the_published_ones() -> None:
    """Of XAttention, of MInference (rows of the probe, tile, columns and distances that are forced, least budgets), and
    OpenVINO GenAI's chunk."""
    assert xattention.TAU == 0.9 and trishape.CHUNK == 256
    assert (minference.LAST, BLOCK, minference.FIRST, minference.NEAR, LEAST[LINES]) == (64, 64, 30, 100, (30, 50))
