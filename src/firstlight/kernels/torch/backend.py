"""The torch backend's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.torch.attention import attend, attend_work
from firstlight.kernels.torch.ops import (
    PackedLinears,
    add_norm,
    dependent_linears,
    gelu_mul,
    linear,
    rms_norm,
    rotate,
    silu_mul,
)

__all__ = [
    "PackedLinears",
    "add_norm",
    "attend",
    "attend_work",
    "dependent_linears",
    "gelu_mul",
    "linear",
    "rms_norm",
    "rotate",
    "silu_mul",
]
