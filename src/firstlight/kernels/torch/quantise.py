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
    rows = empty_rows8(n, width)
    rows.values[:n], rows.scale[:] = rounded(x.float() * smooth)
    return rows


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x f32 [n, I] -> bytes u8 [n, I] of the turned rows around `ZERO_POINT`, and what a step is worth f32 [n]."""
    turned = _turned(x)
    most = turned.abs().amax(-1)
    steps = torch.where(most > _TINY, 127 / most, torch.zeros(()))
    values = torch.mul(turned, steps[:, None]).round_().add_(ZERO_POINT).to(torch.uint8)
    return values, most / (127 * hadamard_block(x.shape[1]) ** 0.5)


def turned_back(x: Tensor) -> Tensor:
    """x f32 [.., I], turned -> [.., I] as it was."""
    back: Tensor = _turned(x.reshape(-1, x.shape[-1])).view(x.shape) / hadamard_block(x.shape[-1]) ** 0.5
    return back


def _turned(x: Tensor) -> Tensor:
    """x f32 [n, I] -> [n, I], blocks times a Hadamard matrix of +-1: one sum and one difference a stage."""
    block, step = hadamard_block(x.shape[1]), 1
    while step < block:
        a, b = x.view(len(x), x.shape[1] // (2 * step), 2, step).unbind(2)
        x = torch.stack([a + b, a - b], 2).view(x.shape)
        step *= 2
    return x
