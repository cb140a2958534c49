"""Linears straight from GGUF blocks: to the bit what the same weights give, unpacked and packed into panels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from answers import BF16, F32, VARIANTS, backend, threads
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from firstlight.kernels.blocks import TYPES, Stored
from firstlight.kernels.cpu.blocks import Blocks
from firstlight.kernels.cpu.linears import Panels
from firstlight.models.calibration import layers_of
from firstlight.models.families import build_model
from firstlight.models.weights import gguf
from tests.tiny import in_blocks, tiny_config, tiny_weights, unpacked

BYTES = {name: (count, size) for name, count, size in gguf.TYPES.values()}
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block's float16 numbers are; of the others at 0."""
ROWS = (1, 3, 6, 7, 36, 37, 100, 390)


def random(kind: str, outputs: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of blocks u8 [O, bytes]: any bits at all, but for the scales, which are those of a model."""
    count, size = BYTES[kind]
    noise = np.random.default_rng(seed)
    blocks = noise.integers(0, 256, (outputs, width // count, size), np.uint8)
    for at in HALVES.get(kind, (0,)):
        scale = (noise.standard_normal(blocks.shape[:2]) * 0.01).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(outputs, -1))


def values(stored: Stored) -> torch.Tensor:
    """The judge: what gguf makes of them, f32 [O, I]."""
    return torch.from_numpy(dequantize(stored.raw.numpy(), GGMLQuantizationType[stored.type]).astype(np.float32))


def check(joined: list[Stored], dtype: torch.dtype) -> None:
    plain = torch.cat([values(stored) for stored in joined]).to(dtype)
    ours, want = Blocks(Blocks.packed(joined)), Panels(plain)
    assert ours.shape == want.shape == tuple(plain.shape)
    x = torch.randn(max(ROWS), plain.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    for n in ROWS:
        for count in (1, 2):
            with threads(count):
                assert torch.equal(ours(x[:n]), want(x[:n]))
    assert torch.equal(ours(x[:2], wide=True), want(x[:2], wide=True))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_a_product_is_that_of_the_unpacked_weights(name: str, kind: str) -> None:
    backend(name)
    for dtype in (F32, BF16):
        check([Stored(kind, random(kind, 100, 768), dtype)], dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_types_may_differ_among_joined_ones(name: str) -> None:
    backend(name)
    kinds = [("Q5_0", 128), ("Q5_0", 64), ("Q8_0", 37), ("Q6_K", 5)]
    check([Stored(kind, random(kind, outputs, 256, outputs), BF16) for kind, outputs in kinds], BF16)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_rows_are_the_weights(kind: str) -> None:
    stored = Stored(kind, random(kind, 100, 512), F32)
    parts = Blocks.packed([stored])
    ids = torch.tensor([[99, 0, 3], [64, 63, 0]])
    assert torch.equal(Blocks(parts).rows(ids), values(stored)[ids])
    whole = Blocks.packed([Stored(kind, random(kind, 128, 512), F32)])
    assert sum(part.nbytes for part in whole.values()) <= 1.04 * 128 * stored.raw.shape[1] + 64


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "gemma3"])
def test_a_model_of_blocks_is_the_model_unpacked(family: str, dtype: torch.dtype) -> None:
    """Joined, alone, among experts, beside a tensor that is in no blocks, as head and as embedding."""
    ops, config = backend("cpu"), replace(tiny_config(family=family), tie_head=family != "qwen2")
    weights = tiny_weights(dtype, family=family)
    if not config.tie_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    stored = in_blocks(weights)
    assert sum(isinstance(w, Stored) for w in stored.values()) >= 13
    made, want = (build_model(config, source, ops) for source in (stored, unpacked(stored)))
    ids = torch.arange(20)
    assert torch.equal(made.embed(ids), want.embed(ids))
    for ours, theirs in zip(layers_of(made, ids), layers_of(want, ids), strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert torch.equal(made.head(made.embed(ids)), want.head(want.embed(ids)))
    assert (made.row_flops, made.dtype) == (want.row_flops, want.dtype)
