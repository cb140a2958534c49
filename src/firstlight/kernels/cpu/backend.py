"""The compiled backend's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.cpu.attention import attend, attend_work
from firstlight.kernels.cpu.ops import add_norm, gelu_mul, rms_norm, rotate, silu_mul
from firstlight.kernels.torch.ops import PackedLinears, dependent_linears, linear

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
