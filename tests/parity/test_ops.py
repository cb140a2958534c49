"""Row-local operators: the reference against their formulas in complex and double arithmetic, the others against it.

Tolerances. Float32: 1e-5 of the value's scale. Bfloat16, whose inputs both sides share: 2^-7 of it, one rounding of the
result and one inside. Where rows are said to keep their bits, they keep them exactly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from answers import BF16, F32, backend, each_backend, each_dtype, threads
from test_int8 import CALLS
from torch import Tensor

from firstlight.kernels.reference import ops as reference

OPS = ["rms_norm", "add_norm", "rotate", "rotate_normed", "silu_mul", "gelu_mul", "linear"]
SHAPES = [(1, 1, 64), (3, 3, 64), (4, 9, 64), (5, 1, 256), (67, 2, 128), (300, 4, 64)]
"""(rows, heads, head dim)."""


def operands(op: str, n: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, list[object]]:
    """An operator's rows, and its other operands by row where they go by row."""
    gen = torch.Generator().manual_seed(n * heads + dim)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    width = heads * dim
    if op == "rms_norm":
        return draw(n, width).to(dtype) * 3, [draw(width), 1e-5]
    if op == "add_norm":
        return draw(n, width) * 3, [draw(n, width).to(dtype), draw(width), 1e-5, dtype]
    if op.startswith("rotate"):
        angle = draw(n, dim // 2) * 100
        cos, sin = angle.cos(), angle.sin()
        norm = [draw(n), draw(heads, dim), 1e-5] if op == "rotate_normed" else []
        return draw(n, heads, dim).to(dtype), [torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1), *norm]
    if op in ("silu_mul", "gelu_mul"):
        return (draw(n, 2 * width) * 4).to(dtype), []
    return draw(n, width).to(dtype), [(draw(96, width) / width**0.5).to(dtype)]


def apply(name: str, op: str, x: Tensor, rest: list[object], rows: slice = slice(None)) -> Tensor:
    """The operator on some of the rows."""
    by_row = {"rotate": 2, "rotate_normed": 3, "add_norm": 1}.get(op, 0)
    call: Callable[..., Tensor] = getattr(backend(name), op.removesuffix("_normed"))
    return call(x[rows].clone(), *(r[rows] if i < by_row else r for i, r in enumerate(rest)))


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == F32 else 2**-7
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


def formula(op: str, x: Tensor, rest: list) -> Tensor:
    x = x.double()
    if op == "add_norm":
        return formula("rms_norm", x + rest[0].double(), rest[1:])
    if op == "rms_norm":
        return x * (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + rest[1]).pow(-0.5) * rest[0].double()
    if op == "rotate_normed":
        cos, sin, scale, *norm = rest
        return formula("rotate", formula("rms_norm", x * scale.double()[:, None, None], [norm[0], norm[1]]), [cos, sin])
    if op == "rotate":
        half = x.shape[-1] // 2
        turn = torch.complex(*(r[:, half:].double() for r in rest))[:, None]
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)
    if op.endswith("_mul"):
        gate, up = x.chunk(2, -1)
        inner = gate if op == "silu_mul" else (gate + 0.044715 * gate**3) * (8 / math.pi) ** 0.5
        return gate / (1 + torch.exp(-inner)) * up
    return torch.einsum("ni,oi->no", x, rest[0].double())


def test_no_operator_is_forgotten() -> None:
    """Whatever the judge has is judged: here, or with its scales in test_int8.py."""
    public = {name for name, each in vars(reference).items() if isinstance(each, FunctionType) and name[0] != "_"}
    assert {name for name in public if vars(reference)[name].__module__ == reference.__name__} <= {
        *OPS,
        *CALLS,
        "shift_rows",
    }  # the last one in test_tape.py


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_reference_is_the_formula(op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, rest = operands(op, *shape, dtype)
    got = apply("reference", op, x, rest)
    assert got.dtype == F32
    assert_near(got, formula(op, x, rest), F32)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_agrees(name: str, op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, rest = operands(op, *shape, dtype)
    before = x.clone()
    got, want = apply(name, op, x, rest), apply("reference", op, x, rest)
    assert got.dtype == dtype and got.shape == want.shape and torch.equal(x, before)
    assert_near(got, want, dtype)


def blocks_follow_rows(op: str, dtype: torch.dtype) -> bool:
    """Whether this machine lets a product's bits follow its row count, and nothing keeps it from that."""
    amx = torch.cpu._is_amx_tile_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ
    return op == "linear" and dtype == BF16 and amx


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(67, 2, 128), (300, 4, 64)])
@pytest.mark.parametrize("op", OPS)
def test_rows_keep_their_bits(name: str, op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Any rows, alone or with others, on one thread or two."""
    if blocks_follow_rows(op, dtype):
        pytest.skip("bfloat16 products on AMX keep a row's bits in --deterministic only")
    x, rest = operands(op, *shape, dtype)
    with threads(1):
        whole = apply(name, op, x, rest)
    with threads(2):
        assert torch.equal(apply(name, op, x, rest), whole)
        for a, e in ((0, 1), (5, 6), (2, 5), (7, 40), (1, 66)):
            assert torch.equal(apply(name, op, x, rest, slice(a, e)), whole[a:e])
