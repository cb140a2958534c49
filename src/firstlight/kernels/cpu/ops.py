"""Row-local operators on the compiled kernels (csrc/rows.cpp): one pass over memory each.

A row's bits don't depend on the rows beside it, nor on threads. Around int8 linears rows come with a `scale` f32 [n]
that they are still to be multiplied by, and leave as `Rows8` where `smooth`, the smoothing vector of the linear that
reads them, is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.kernels.memory import empty
from firstlight.kernels.native import lib
from firstlight.kernels.rows8 import Rows8, empty_rows8

_BF16 = torch.bfloat16
_SILU, _GELU = 0, 1


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [.., D] -> [.., D], to unit mean square, times gain f32 [D] (arXiv 1910.07467, eq. 4); float32 inside."""
    assert lib is not None and gain.dtype == torch.float32 and gain.is_contiguous()
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width)
    out = empty(x.shape, x.dtype)
    lib.rms_norm(*_rows(rows, out, width), gain.data_ptr(), eps)
    return out


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Tensor | Rows8:
    """Residual x f32 [n, D] += delta [n, D] in place, if given; then `rms_norm` of x as `dtype` [n, D]."""
    assert lib is not None and gain.dtype == x.dtype == torch.float32 and x.stride(1) == 1
    assert delta is None or delta.dtype == dtype
    n, width = x.shape
    out = _output(n, width, dtype, smooth)
    common = _rows(delta, out, width, scale, smooth, n, dtype)
    lib.add_norm(*common, x.data_ptr(), x.stride(0), gain.data_ptr(), eps)
    return out


def add_rows(x: Tensor, delta: Tensor, scale: Tensor | None = None) -> None:
    """Residual x f32 [n, D] += delta [n, D]."""
    assert lib is not None and x.dtype == torch.float32 and x.stride(1) == 1
    lib.add_rows(*_rows(delta, delta, x.shape[1], scale), x.data_ptr(), x.stride(0))


def scale_rows(x: Tensor, scale: Tensor) -> None:
    """x [n, ..] *= scale f32 [n], in place; a row's scalars lie together."""
    assert lib is not None and (x.dim() == 2 or x.stride(1) == x.shape[2])
    lib.copy_rows(*_rows(x, x, x.shape[1:].numel(), scale))


def shift_rows(x: Tensor, by: Tensor) -> None:
    """x [n, ..] += by f32 [..] in each row, in place; a row's scalars lie together."""
    assert lib is not None and by.dtype == torch.float32 and by.is_contiguous()
    assert x.dim() == 2 or x.stride(1) == x.shape[2]
    lib.shift_rows(*_rows(x, x, by.numel()), by.data_ptr())


def quantise(x: Tensor, smooth: Tensor) -> Rows8:
    """x [n, I], smooth f32 [I] -> `Rows8`."""
    assert lib is not None
    rows = empty_rows8(*x.shape)
    lib.copy_rows(*_rows(x, rows, x.shape[1], None, smooth))
    return rows


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """RoPE on halves, in place (arXiv 2104.09864, eq. 34). x [n, H, D] -> x; cos, sin f32 [n, D], sin signed.

    With `gain` f32 [H, D] each head goes through `rms_norm` first.
    """
    _, heads, dim = x.shape
    assert lib is not None and x.stride(2) == 1 and x.stride(1) == dim and cos.is_contiguous() and sin.is_contiguous()
    assert gain is None or (gain.is_contiguous() and gain.shape == x.shape[1:])
    lib.rotate(*_rows(x, x, dim, scale), heads, cos.data_ptr(), sin.data_ptr(), _address(gain), eps)
    return x


def silu_mul(gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Tensor | Rows8:
    """gate_up [n, 2F], gate first -> silu(gate) * up [n, F] (SwiGLU, arXiv 2002.05202)."""
    return _gate_mul(gate_up, _SILU, scale, smooth)


def gelu_mul(gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Tensor | Rows8:
    """gate_up [n, 2F], gate first -> gelu(gate) * up [n, F], GELU in its tanh form (arXiv 1606.08415)."""
    return _gate_mul(gate_up, _GELU, scale, smooth)


def _gate_mul(gate_up: Tensor, gate: int, scale: Tensor | None, smooth: Tensor | None) -> Tensor | Rows8:
    assert lib is not None
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = _output(n, width, gate_up.dtype, smooth)
    lib.gate_mul(*_rows(gate_up, out, width, scale, smooth), gate)
    return out


def _output(n: int, width: int, dtype: torch.dtype, smooth: Tensor | None) -> Tensor | Rows8:
    return empty((n, width), dtype) if smooth is None else empty_rows8(n, width)


def _rows(
    x: Tensor | None,
    out: Tensor | Rows8,
    width: int,
    scale: Tensor | None = None,
    smooth: Tensor | None = None,
    n: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[int | bool, ...]:
    """What every row operator takes, in the order of csrc/rows.h; `n` and `dtype` of an input that isn't there."""
    target, made = out if isinstance(out, Rows8) else (out, None)
    assert x is None or x.stride(-1) == 1
    assert (scale is None or scale.is_contiguous()) and (smooth is None or smooth.is_contiguous())
    n, dtype, step = (n, dtype, 0) if x is None else (x.shape[0], x.dtype, x.stride(0))
    out_step = step if target is x else width
    where = (_address(x), target.data_ptr(), step, out_step, n, width, torch.get_num_threads(), dtype == _BF16)
    return *where, _address(scale), _address(made), _address(smooth)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
