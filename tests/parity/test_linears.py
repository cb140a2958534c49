"""Linears: products against plain ones in float64, and the bits of their rows.

Tolerances. Float32 results: 1e-5 of the largest. bf16 results: one rounding, 2^-8 of the value, and that. Int8 sums are
exact, so these products are those of any other exact kernel, oneDNN's too, bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from answers import BF16, F32, VARIANTS, backend, each_backend, each_dtype, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.kernels.cpu.linears import Panels, has_tiles
from firstlight.kernels.torch.int8 import OneDnn8

each_variant = pytest.mark.parametrize("name", VARIANTS)
ROWS = [*range(1, 18), 36, 37, 48, 100]
OUTPUTS = [1, 17, 63, 64, 65, 130, 576]
WIDTHS = [1, 3, 36, 64, 575, 4997]  # the last one's panels don't fit the cache: sums wait in memory
shapes = given(
    n=st.sampled_from(ROWS), outputs=st.sampled_from(OUTPUTS), width=st.sampled_from(WIDTHS), seed=st.integers(0, 9)
)


def draw(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=gen).to(dtype)
    low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
    return torch.randint(low, high, shape, generator=gen, dtype=dtype)


def made(w: Tensor) -> Any:
    """Panels of whichever kind; a step of an int8 output is worth a power of two, so that nothing is rounded twice."""
    return Panels(w, torch.exp2(-(torch.arange(len(w)) % 7).float()) if w.dtype == torch.int8 else None)


def operands(dtype: torch.dtype, n: int, outputs: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw(seed, torch.uint8 if dtype == torch.int8 else dtype, n, width), draw(seed + 1, dtype, outputs, width)


def formula(x: Tensor, w: Tensor) -> Tensor:
    if w.dtype != torch.int8:
        return x.double() @ w.double().T
    return (x.double() - 128) @ w.double().T * torch.exp2(-(torch.arange(len(w)) % 7)).double()


each_kind = pytest.mark.parametrize("kind", [F32, BF16, torch.int8])


@each_variant
@each_kind
@settings(max_examples=40)
@shapes
def test_products_are_the_formula(name: str, kind: torch.dtype, n: int, outputs: int, width: int, seed: int) -> None:
    backend(name)
    x, w = operands(kind, n, outputs, width, seed)
    product, want = made(w), formula(x, w)
    wide, short = product(x, wide=True), product(x)
    assert wide.dtype == F32 and wide.shape == want.shape and short.dtype == (F32 if kind == F32 else BF16)
    if kind == torch.int8:
        assert torch.equal(wide, want.float())
    else:
        assert (wide - want).abs().max() <= 1e-5 * want.abs().max() + 1e-30
    assert torch.equal(short, wide.to(short.dtype))


@each_variant
@pytest.mark.parametrize("shape", [(96, 576), (64, 100), (130, 1536)])
def test_int8_products_are_onednns(name: str, shape: tuple[int, int]) -> None:
    backend(name)
    x, w = operands(torch.int8, 50, *shape)
    scale = draw(3, F32, shape[0]).abs()
    if not torch.cpu._is_vnni_supported():
        pytest.skip("oneDNN's other int8 kernels overflow")
    assert torch.equal(Panels(w, scale)(x), OneDnn8(w, scale)(x))


@each_variant
@each_kind
@pytest.mark.parametrize(("outputs", "width"), [(576, 576), (65, 4997), (960, 64)])
def test_a_row_keeps_its_bits(name: str, kind: torch.dtype, outputs: int, width: int) -> None:
    """Alone or among any rows, at any place, however they lie in memory, on one thread or two."""
    backend(name)
    x, w = operands(kind, 100, outputs, width)
    product = made(w)
    with threads(1):
        whole = product(x)
    spread = torch.empty(100, width + 7, dtype=x.dtype)[:, :width].copy_(x)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(product(spread), whole)
            for n in ROWS:
                a = (7 * n) % (101 - n)
                assert torch.equal(product(x[a : a + n]), whole[a : a + n])


@each_variant
@each_kind
def test_what_lies_past_the_end_of_a_row_is_not_seen(name: str, kind: torch.dtype) -> None:
    backend(name)
    x, w = operands(kind, 5, 70, 33)
    poisoned = torch.full((5, 40), 255 if kind == torch.int8 else float("nan"), dtype=x.dtype)
    poisoned[:, :33] = x
    assert torch.equal(made(w)(poisoned[:, :33]), made(w)(x))


@pytest.mark.skipif(not VARIANTS, reason="no compiled kernels here")
@each_kind
@pytest.mark.parametrize(("outputs", "width"), [(64, 64), (130, 33)])
def test_weights_can_be_read_back(kind: torch.dtype, outputs: int, width: int) -> None:
    w = draw(1, kind, outputs, width)
    ids = torch.tensor([[0, 5], [outputs - 1, 63]])
    assert torch.equal(made(w).rows(ids), w[ids])


@each_backend
@each_dtype
def test_logits_are_as_good_as_float32s(name: str, dtype: torch.dtype) -> None:
    """At least those of the likeliest tokens."""
    x, w = operands(dtype, 9, 500, 96)
    linears = backend(name).PackedLinears([("head", w)])
    got, want = linears.logits(x), formula(x, w)
    best = want.topk(16).indices
    assert got.dtype == F32 and (got - want).gather(1, best).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(got.argmax(1), want.argmax(1)) and torch.equal(linears.head_rows(best), w[best])


NARROW = """
import torch
from firstlight.kernels.torch.ops import PackedLinears, linear
x, w = torch.randn(9, 96).bfloat16(), torch.randn(500, 96).bfloat16()
for made in (PackedLinears([("q", w)])("q", x), linear(x, w), linear(x[:1], w)):
    torch.testing.assert_close(made.float(), x[: len(made)].float() @ w.float().T, rtol=2**-8, atol=1e-4)
    assert made.dtype == torch.bfloat16
"""


def test_a_processor_without_bf16_products_has_float32s() -> None:
    """PyTorch's operators below AVX-512, where oneDNN refuses bf16."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert subprocess.run([sys.executable, "-c", NARROW], env=env, check=False).returncode == 0


@each_variant
def test_one_copy_of_the_weights_is_kept(name: str) -> None:
    if has_tiles():
        pytest.skip("oneDNN's products keep the head's rows beside the packed ones")
    w = draw(1, BF16, 640, 576)
    linears = backend(name).PackedLinears([("head", w)])
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(linears)}
    assert sum(kept.values()) == w.nbytes and w.data_ptr() not in kept


def tensors(thing: object) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    inner = thing.values() if isinstance(thing, dict) else vars(thing).values() if hasattr(thing, "__dict__") else ()
    return [t for part in inner for t in tensors(part)]
