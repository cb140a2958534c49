"""The reference's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.reference.attention import attend
from firstlight.kernels.reference.ops import add_norm, gelu_mul, linear, rms_norm, rotate, silu_mul

__all__ = ["add_norm", "attend", "gelu_mul", "linear", "rms_norm", "rotate", "silu_mul"]
