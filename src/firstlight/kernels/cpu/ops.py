"""Row-local operators on the compiled kernels (csrc/rows.cpp): one pass over memory each.

A row's bits don't depend on the rows beside it, nor on threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.kernels.native import lib

_BF16 = torch.bfloat16
_SILU, _GELU = 0, 1


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [.., D] -> [.., D], to unit mean square, times gain f32 [D] (arXiv 1910.07467, eq. 4); float32 inside."""
    assert lib is not None and gain.dtype == torch.float32 and gain.is_contiguous()
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype)
    lib.rms_norm(*_rows(rows, out, rows.stride(0), width, len(rows), width), gain.data_ptr(), eps)
    return out


def add_norm(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Residual x f32 [n, D] += delta [n, D] in place, if given; then `rms_norm` of x as `dtype` [n, D]."""
    assert lib is not None and gain.dtype == x.dtype == torch.float32 and x.stride(1) == 1
    n, width = x.shape
    out = torch.empty(n, width, dtype=dtype)
    given = x if delta is None else delta
    where = (0 if delta is None else delta.data_ptr(), out.data_ptr(), given.stride(0), width, n, width)
    lib.add_norm(*where, torch.get_num_threads(), dtype == _BF16, x.data_ptr(), x.stride(0), gain.data_ptr(), eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves, in place (arXiv 2104.09864, eq. 34). x [n, H, D] -> x; cos, sin f32 [n, D], sin signed."""
    n, heads, dim = x.shape
    assert lib is not None and x.stride(2) == 1 and x.stride(1) == dim and cos.is_contiguous() and sin.is_contiguous()
    step = x.stride(0)
    lib.rotate(*_rows(x, x, step, step, n, dim), heads, cos.data_ptr(), sin.data_ptr())
    return x


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [n, 2F], gate first -> silu(gate) * up [n, F] (SwiGLU, arXiv 2002.05202)."""
    return _gate_mul(gate_up, _SILU)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [n, 2F], gate first -> gelu(gate) * up [n, F], GELU in its tanh form (arXiv 1606.08415)."""
    return _gate_mul(gate_up, _GELU)


def _gate_mul(gate_up: Tensor, gate: int) -> Tensor:
    assert lib is not None and gate_up.stride(1) == 1
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, width, dtype=gate_up.dtype)
    lib.gate_mul(*_rows(gate_up, out, gate_up.stride(0), width, n, width), gate)
    return out


def _rows(x: Tensor, out: Tensor, in_row: int, out_row: int, rows: int, width: int) -> tuple[int | bool, ...]:
    """The common beginning of every row operator's arguments."""
    return x.data_ptr(), out.data_ptr(), in_row, out_row, rows, width, torch.get_num_threads(), x.dtype == _BF16
