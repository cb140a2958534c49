"""Products by tiles: the bits that Intel documents, from the model of the instructions and from a machine with them.

A tile multiplies 16 pairs of bf16 at a time: first halves and second halves of the pairs are summed apart, in order and
from zero, each product rounded with its sum; the two sums are joined, and then added to what was there. Numbers below
the smallest normal one count as zero.
"""

from __future__ import annotations

import pytest
import torch
from answers import BF16, VARIANTS, assert_same_bits, backend, run
from cases import MIXED, Req, Spec, build
from torch import Tensor

from firstlight.kernels.cpu.linears import Panels

WITH_TILES = [name for name in VARIANTS if "amx" in name]
each_with_tiles = pytest.mark.parametrize("name", WITH_TILES)
on_the_machine = pytest.mark.skipif("cpu:amx" not in VARIANTS, reason="this processor has no AMX tiles")
SHAPES = [(1, 64, 32), (3, 70, 96), (16, 64, 100), (17, 130, 64), (40, 65, 33), (100, 64, 1600)]
"""(rows, outputs, width): tiles that are whole and that aren't, in every direction; panels in parts."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def documented(x: Tensor, w: Tensor) -> Tensor:
    """x [n, I], w [O, I] -> x w^T as tiles sum it. In float64 nothing of one step is lost, so it is rounded once."""
    missing = -x.shape[1] % 32
    a, b = (torch.nn.functional.pad(t.double(), (0, missing)).unflatten(1, (-1, 16, 2)) for t in (x, w))
    sums = torch.zeros(len(x), len(w))
    for step in range(a.shape[1]):
        halves = [torch.zeros_like(sums) for _ in range(2)]
        for k in range(16):
            for half in range(2):
                product = a[:, step, k, half, None] * b[:, step, k, half]
                halves[half] = (halves[half].double() + product).float()
        sums = sums + (halves[0] + halves[1])
    return sums


@each_with_tiles
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_rounded_as_documented(name: str, shape: tuple[int, int, int]) -> None:
    rows, outputs, width = shape
    backend(name)
    x, w = draw(1, rows, width), draw(2, outputs, width)
    assert torch.equal(Panels(w)(x, wide=True), documented(x, w))


@each_with_tiles
def test_subnormal_numbers_are_zero(name: str) -> None:
    backend(name)
    x = torch.zeros(4, 64, dtype=BF16)
    w = torch.zeros(64, 64, dtype=BF16)
    x[0, 5], w[:, 5] = 2.0**-130, 2.0**20  # a factor
    x[1, 6], w[:, 6] = 2.0**-70, 2.0**-60  # a product
    x[2, 7], w[:, 7] = 2.0**-60, 2.0**-60
    assert Panels(w)(x, wide=True)[:, 0].tolist() == [0, 0, 2.0**-120, 0]


@on_the_machine
@pytest.mark.parametrize("kind", [BF16, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_multiplies_as_the_machine(kind: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, outputs, width = shape
    x, w = draw(1, rows, width), draw(2, outputs, width)
    scale = None
    if kind == torch.int8:
        x, w, scale = (
            ((x * 40).clamp(-128, 127) + 128).to(torch.uint8),
            (w * 40).clamp(-127, 127).to(kind),
            torch.ones(outputs),
        )
    got = []
    for name in ("cpu:amx", "cpu:amx_model"):
        backend(name)
        got.append(Panels(w, scale)(x, wide=True))
    assert torch.equal(*got)


@on_the_machine
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dim", "plan"), [(64, "none"), (128, "mixed"), (16, "mixed"), (80, "none")])
def test_the_model_attends_as_the_machine(dim: int, plan: str, int8: bool) -> None:
    call = build(Spec(dim=dim, dtype=BF16, int8=int8, plan=plan, reqs=(*MIXED, Req(700, 40)), probe_rows=8))
    assert_same_bits(run("cpu:amx", call), run("cpu:amx_model", call))
