"""The torch backend's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.torch.attention import attend, attend_work
from firstlight.kernels.torch.ops import PackedLinears, dependent_linears, linear, rms_norm, rotate, silu_mul

__all__ = ["PackedLinears", "attend", "attend_work", "dependent_linears", "linear", "rms_norm", "rotate", "silu_mul"]
