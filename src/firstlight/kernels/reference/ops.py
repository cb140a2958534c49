"""The reference of the row-local operators between two attentions. Any dtype in, float32 out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [n, D] over the root of its mean square, times gain [D] (arXiv 1910.07467, eq. 4) -> [n, D]."""
    x = x.float()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


def add_norm(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`rms_norm` of x f32 [n, D] + delta [n, D]; `dtype` is the one that other backends round to."""
    return rms_norm(x if delta is None else x + delta.float(), gain, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of x [n, H, D] by its angle -> [n, H, D].

    cos f32 [n, D] holds each pair's cosine in both halves, sin f32 [n, D] its sine, negative in the first half.

    Rotary embedding (arXiv 2104.09864, eq. 34), with the pairs in the two halves of a head, as GPT-NeoX lays them.
    """
    a, b = x.float().chunk(2, dim=-1)
    return x.float() * cos[:, None] + torch.cat([b, a], dim=-1) * sin[:, None]


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [n, 2F], gate first -> silu(gate) * up [n, F] (SwiGLU, arXiv 2002.05202)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [n, 2F], gate first -> gelu(gate) * up [n, F], GELU in its tanh form (arXiv 1606.08415)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x [n, I], w [O, I] -> x w^T [n, O]."""
    return x.float() @ w.float().T
