"""Rows in 8 bits, as int8 linears read them: what stands between a norm or a gate and the product that follows it.

A row is multiplied channel by channel by `smooth` (SmoothQuant, arXiv 2211.10438), turned block by block with a
Hadamard matrix (QuaRot, arXiv 2404.00456), and rounded so that its largest value becomes 127. Weights are divided by
`smooth`, turned and rounded the same way, so the product stays what it was but for the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firstlight.kernels.memory import empty

MIN_ROWS = 4
"""Below a few rows oneDNN takes a matrix-vector path, with other bits and less speed."""
ZERO_POINT = 128
_LARGEST_BLOCK = 512


class Rows8(NamedTuple):
    """n rows of I channels: channel j of row i is (values[i, j] - 128) * scale[i], turned and smoothed."""

    values: Tensor
    """u8 [max(n, MIN_ROWS), I]; rows from n on hold anything."""
    scale: Tensor
    """f32 [n]."""


def empty_rows8(n: int, width: int) -> Rows8:
    """Rows to be written."""
    return Rows8(empty((max(n, MIN_ROWS), width), torch.uint8), empty((n,), torch.float32))


def hadamard_block(width: int) -> int:
    """Channels that are turned together: the largest power of two that divides the width, up to 512."""
    return min(width & -width, _LARGEST_BLOCK)
