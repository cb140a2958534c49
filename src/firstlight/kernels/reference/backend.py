"""The reference's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.reference.attention import attend
from firstlight.kernels.reference.ops import (
    add_norm,
    add_rows,
    gelu_mul,
    linear,
    quantise,
    rms_norm,
    rotate,
    scale_rows,
    shift_rows,
    silu_mul,
)

__all__ = [
    "add_norm",
    "add_rows",
    "attend",
    "gelu_mul",
    "linear",
    "quantise",
    "rms_norm",
    "rotate",
    "scale_rows",
    "shift_rows",
    "silu_mul",
]
