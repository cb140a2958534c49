"""The reference of the row-local operators between two attentions. Any dtype in, float32 out.

Around int8 linears rows come with a `scale` [n] that they are still to be multiplied by, and leave as `Rows8` where
`smooth`, the smoothing vector of the linear that reads them, is given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from firstlight.kernels.rows8 import ZERO_POINT, Rows8, empty_rows8, hadamard_block


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [n, D] over the root of its mean square, times gain [D] (arXiv 1910.07467, eq. 4) -> [n, D]."""
    x = x.float()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Tensor | Rows8:
    """`rms_norm` of x f32 [n, D] + delta [n, D]; `dtype` is the one that other backends round to."""
    return _given(rms_norm(x if delta is None else x + _scaled(delta, scale), gain, eps), smooth)


def add_rows(x: Tensor, delta: Tensor, scale: Tensor | None = None) -> None:
    """x f32 [n, D] += delta [n, D]."""
    x.add_(_scaled(delta, scale))


def scale_rows(x: Tensor, scale: Tensor) -> None:
    """x [n, ..] *= scale [n]."""
    x.copy_(_scaled(x, scale))


def shift_rows(x: Tensor, by: Tensor) -> None:
    """x [n, ..] += by [..] in each row."""
    x.add_(by)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of x [n, H, D] by its angle -> [n, H, D].

    cos f32 [n, D] holds each pair's cosine in both halves, sin f32 [n, D] its sine, negative in the first half.

    Rotary embedding (arXiv 2104.09864, eq. 34), with the pairs in the two halves of a head, as GPT-NeoX lays them. With
    `gain` f32 [H, D] each head is normed first.
    """
    x = _scaled(x, scale)
    if gain is not None:
        x = rms_norm(x, gain, eps)
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([b, a], dim=-1) * sin[:, None]


def silu_mul(gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Tensor | Rows8:
    """gate_up [n, 2F], gate first -> silu(gate) * up [n, F] (SwiGLU, arXiv 2002.05202)."""
    gate, up = _scaled(gate_up, scale).chunk(2, dim=-1)
    return _given(functional.silu(gate) * up, smooth)


def gelu_mul(gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Tensor | Rows8:
    """gate_up [n, 2F], gate first -> gelu(gate) * up [n, F], GELU in its tanh form (arXiv 1606.08415)."""
    gate, up = _scaled(gate_up, scale).chunk(2, dim=-1)
    return _given(functional.gelu(gate, approximate="tanh") * up, smooth)


def quantise(x: Tensor, smooth: Tensor) -> Rows8:
    """x [n, I] times smooth [I], each block times a Hadamard matrix, in steps of a 127th of the row's largest value."""
    n, width = x.shape
    block = hadamard_block(width)
    blocks = (x.float() * smooth).view(n, width // block, block)
    turned = (blocks @ (_hadamard(block) / block**0.5)).view(n, width)
    rows = empty_rows8(n, width)
    rows.scale.copy_(turned.abs().amax(-1) / 127)
    steps = (turned / rows.scale[:, None]).nan_to_num()
    rows.values[:n] = (steps.round() + ZERO_POINT).to(torch.uint8)
    return rows


def _hadamard(n: int) -> Tensor:
    """[n, n] of +-1, rows orthogonal (Sylvester's construction)."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.float() if scale is None else x.float() * scale.view(-1, *(1,) * (x.dim() - 1))


def _given(x: Tensor, smooth: Tensor | None) -> Tensor | Rows8:
    return x if smooth is None else quantise(x, smooth)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x [n, I], w [O, I] -> x w^T [n, O]."""
    return x.float() @ w.float().T
