"""Rows in 8 bits and int8 linears: the operators against the reference, the products against those of floats.

Tolerances. Bytes may differ by one step where a value lies between two; scales and whatever stays a float as in
test_ops.py. Where rows are said to keep their bits, they keep them exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from answers import BF16, F32, backend, each_backend, each_dtype, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.kernels.rows8 import ZERO_POINT, Rows8, hadamard_block
from firstlight.kernels.torch.int8 import Int8Linears, smoothing
from firstlight.models.calibration import measure, remember, remembered
from firstlight.models.families import FAMILIES
from tests.tiny import tiny_model

WIDTHS = [5, 24, 64, 96, 576, 640, 1536]
shapes = given(n=st.integers(0, 70), width=st.sampled_from(WIDTHS), seed=st.integers(0, 99))


def draw(seed: int, *shape: int) -> Tensor:
    """Normal rows, in some of which one channel is huge."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=gen)
    if x.dim() > 1 and seed % 3 == 0:
        x[::2, ..., seed % shape[-1]] *= 300
    return x


def floats(rows: Rows8) -> Tensor:
    """[n, I] of what the bytes say, still smoothed and turned."""
    return (rows.values[: len(rows.scale)].float() - ZERO_POINT) * rows.scale[:, None]


def assert_near(got: Rows8 | Tensor, want: Rows8 | Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == F32 else 2**-7
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor) and got.dtype == dtype
        largest = float(want.abs().amax()) if want.numel() else 0.0
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance * (1 + largest))
        return
    assert isinstance(got, Rows8) and len(got.values) >= 4 and got.values.dtype == torch.uint8
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-4, atol=0)
    assert ((floats(got) - floats(want)).abs() <= 1.01 * want.scale[:, None]).all()


def turned(x: Tensor) -> Tensor:
    """x [n, I] times the blocks' Hadamard matrices over the root of their size: in float64, entry by entry."""
    block = hadamard_block(x.shape[1])
    i = torch.arange(block)
    bits = i[:, None] & i[None]
    parity = sum((bits >> k) & 1 for k in range(10)) % 2
    matrix = (1 - 2 * parity).double() / block**0.5
    return (x.double().view(len(x), x.shape[1] // block, block) @ matrix).view(x.shape)


@settings(max_examples=40)
@shapes
def test_the_reference_is_the_formula(n: int, width: int, seed: int) -> None:
    x, smooth = draw(seed, n, width), draw(seed + 1, width).abs() + 0.1
    rows = backend("reference").quantise(x, smooth)
    want = turned(x * smooth)
    assert (floats(rows) - want).abs().le(0.5001 * rows.scale[:, None] + 1e-30).all()
    torch.testing.assert_close(rows.scale, (want.abs().amax(-1) / 127).float())


CALLS: dict[str, Callable[..., object]] = {
    "quantise": lambda ops, t: ops.quantise(t["x"], t["smooth"]),
    "add_norm": lambda ops, t: ops.add_norm(
        t["residual"], t["x"], t["gain"], 1e-5, t["x"].dtype, t["scale"], t["smooth"]
    ),
    "first_norm": lambda ops, t: ops.add_norm(t["residual"], None, t["gain"], 1e-5, BF16, None, t["smooth"]),
    "add_norm_wide": lambda ops, t: ops.add_norm(t["residual"], t["x"], t["gain"], 1e-5, t["x"].dtype, t["scale"]),
    "silu_mul": lambda ops, t: ops.silu_mul(t["pair"], t["scale"], t["smooth"]),
    "silu_mul_wide": lambda ops, t: ops.silu_mul(t["pair"], t["scale"]),
    "gelu_mul": lambda ops, t: ops.gelu_mul(t["pair"], t["scale"], t["smooth"]),
    "gelu_mul_wide": lambda ops, t: ops.gelu_mul(t["pair"], t["scale"]),
    "rotate": lambda ops, t: ops.rotate(t["heads"], t["cos"], t["sin"], t["scale"]),
    "scale_rows": lambda ops, t: (ops.scale_rows(t["heads"][:, 1:], t["scale"]), t["heads"])[1],
    "add_rows": lambda ops, t: (ops.add_rows(t["residual"], t["x"], t["scale"]), t["residual"])[1],
}
each_call = pytest.mark.parametrize("call", CALLS)


def operands(n: int, width: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    angle = draw(seed, n, 8)
    return {
        "x": draw(seed, n, width).to(dtype),
        "residual": draw(seed + 1, n, width),
        "gain": draw(2, width),
        "smooth": torch.exp2(draw(1, width).round()).clamp(0.1, 10),
        "scale": draw(seed + 3, n).abs() / 8 + 1e-3,
        "pair": draw(seed + 4, n, 2 * width).to(dtype),
        "heads": draw(seed + 5, n, 3, 16).to(dtype),
        "cos": torch.cat([angle.cos()] * 2, -1),
        "sin": torch.cat([-angle.sin(), angle.sin()], -1),
    }


BY_ROW = {"x", "residual", "scale", "pair", "heads", "cos", "sin"}


def apply(name: str, call: str, given: dict[str, Tensor], rows: slice = slice(None)) -> Rows8 | Tensor:
    cut = {key: t[rows].clone() if key in BY_ROW else t for key, t in given.items()}
    return CALLS[call](backend(name), cut)  # type: ignore[return-value]


@each_backend
@each_dtype
@each_call
@settings(max_examples=12)
@shapes
def test_agrees(name: str, call: str, dtype: torch.dtype, n: int, width: int, seed: int) -> None:
    operand = operands(n, width, seed, dtype)
    if call == "scale_rows":  # rounds in place: the reference too, so that it gets float32
        want = apply("reference", call, {**operand, "heads": operand["heads"].float()})
    else:
        want = apply("reference", call, operand)
    kept = F32 if call == "add_rows" else dtype
    assert_near(apply(name, call, operand), want, kept)


@each_backend
@each_dtype
@each_call
def test_rows_keep_their_bits(name: str, call: str, dtype: torch.dtype) -> None:
    operand = operands(130, 576, 3, dtype)
    with threads(1):
        whole = apply(name, call, operand)
    with threads(2):
        for a, e in ((0, 130), (0, 1), (5, 6), (2, 5), (7, 40), (1, 129)):
            part = apply(name, call, operand, slice(a, e))
            if isinstance(part, Rows8):
                assert isinstance(whole, Rows8) and torch.equal(part.values[: e - a], whole.values[a:e])
                part, kept = part.scale, whole.scale
            else:
                kept = whole
            assert torch.equal(part, kept[a:e])


@each_backend
def test_rows_of_zeros_and_of_next_to_nothing_are_zeros(name: str) -> None:
    x = torch.zeros(6, 64)
    x[1], x[2, 3] = 1e-38, -1e-36
    rows = backend(name).quantise(x, torch.ones(64))
    assert floats(rows).abs().max() <= 1e-30 and rows.scale.isfinite().all()


def linears(name: str, seed: int = 0, spread: Tensor | None = None) -> tuple[Int8Linears, Tensor]:
    weight = draw(seed + 1, 96, 576).to(BF16)
    known = {} if spread is None else {"w": spread}
    return backend(name).Int8Linears(
        [("head", weight[:8].clone()), ("w", weight)], known, ["head"], backend(name)
    ), weight


@each_backend
def test_products_are_near_those_of_floats(name: str) -> None:
    made, weight = linears(name)
    x = draw(1, 40, 576).to(BF16)
    want = x.double() @ weight.double().T
    for given_rows in (x, backend(name).quantise(x, made.reads("w"))):
        got = made("w", given_rows)
        assert got.dtype == BF16 and ((got - want).square().mean() / want.square().mean()).sqrt() < 0.015
    assert torch.equal(made("head", x), made._plain("head", x)) and made.reads("head") is None


@each_backend
def test_smoothing_tames_a_large_channel(name: str) -> None:
    x = draw(1, 40, 576)
    x[:, [7, 300]] *= 100
    errors = []
    for spread in (None, x.square().mean(0)):
        made, weight = linears(name, 1, spread)
        weight = weight.clone()
        want = x.to(BF16).double() @ weight.double().T
        errors.append(float((made("w", x.to(BF16)) - want).square().mean().sqrt()))
    assert errors[1] < 0.6 * errors[0], errors


def test_smoothing_is_by_powers_of_two_and_survives_dead_channels() -> None:
    spread = torch.tensor([1.0, 4.0, 0.0, 1e6])
    smooth = smoothing(torch.ones(3, 4), spread)
    assert torch.equal(smooth.log2(), smooth.log2().round()) and smooth.isfinite().all() and (smooth > 0).all()
    assert smooth[0] > smooth[3]


@each_backend
def test_no_int8_linear_depends_on_rows_or_threads(name: str) -> None:
    made, _ = linears(name)
    assert "w" not in backend(name).dependent_linears(made)
    x = draw(5, 300, 576).to(BF16)
    with threads(1):
        whole = made("w", x)
    with threads(2):
        for a, e in ((0, 300), (0, 1), (3, 5), (9, 17), (1, 98)):
            assert torch.equal(made("w", x[a:e]), whole[a:e])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_nearly_the_same_in_int8(family: str) -> None:
    logits = {}
    for int8 in (False, True):
        model = tiny_model(BF16, family=family, int8=int8)
        ids = torch.arange(40) * 7 % 320
        x = model.embed(ids)
        cos, sin = model.rope(torch.arange(40))
        for layer in range(model.config.num_layers):
            q, k, v = model.qkv(layer, x, cos, sin)
            assert torch.isfinite(q).all() and torch.isfinite(k).all()
            out = v.repeat_interleave(q.shape[1] // v.shape[1], 1)  # everybody reads itself
            model.finish(layer, x, out)
        logits[int8] = model.head(x)
    near = torch.nn.functional.cosine_similarity(logits[True], logits[False], dim=-1)
    assert near.mean() > 0.99, near
    assert not torch.equal(logits[True], logits[False])


def test_what_was_measured_is_remembered(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path))
    model = tiny_model(BF16)
    before = model.linears
    spread = measure(model)
    c, linears = model.config, set(model.linears.shapes) - {"head"}
    assert model.linears is before and set(spread) == linears | {f"{layer}.keys" for layer in range(c.num_layers)}
    assert all(spread[n].shape == model.linears.shapes[n][1:] and (spread[n] >= 0).all() for n in linears)
    assert all(spread[n].shape == (c.num_kv_heads, c.head_dim) for n in set(spread) - linears)
    assert remembered("one") is None
    remember("one", spread)
    kept = remembered("one")
    assert kept is not None and all(torch.equal(kept[name], s) for name, s in spread.items())
    assert remembered("other") is None
    next((tmp_path / "spread").iterdir()).write_bytes(b"broken")
    assert remembered("one") is None
