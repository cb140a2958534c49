"""Rows to 8 bits with PyTorch's operators (rows8.py). A row's bits don't depend on the rows beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.kernels.rows8 import ZERO_POINT, Rows8, empty_rows8, hadamard_block

_TINY = 1e-30
"""Rows below it count as zeros: their reciprocal would overflow."""


def quantise(x: Tensor, smooth: Tensor) -> Rows8:
    """x [n, I], smooth f32 [I] -> `Rows8`."""
    n, width = x.shape
    turned = _turned(x.float() * smooth)
    most = turned.abs().amax(-1)
    steps = torch.where(most > _TINY, 127 / most, torch.zeros(()))
    rows = empty_rows8(n, width)
    rows.values[:n] = torch.mul(turned, steps[:, None]).round_().add_(ZERO_POINT).to(torch.uint8)
    torch.div(most, 127 * hadamard_block(width) ** 0.5, out=rows.scale)
    return rows


def _turned(x: Tensor) -> Tensor:
    """x f32 [n, I] -> [n, I], blocks times a Hadamard matrix of +-1: one sum and one difference a stage."""
    block, step = hadamard_block(x.shape[1]), 1
    while step < block:
        a, b = x.view(len(x), x.shape[1] // (2 * step), 2, step).unbind(2)
        x = torch.stack([a + b, a - b], 2).view(x.shape)
        step *= 2
    return x
