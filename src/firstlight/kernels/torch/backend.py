"""The torch backend's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.torch.attention import attend, attend_cuts
from firstlight.kernels.torch.int8 import Int8Linears
from firstlight.kernels.torch.ops import (
    PackedLinears,
    add_norm,
    add_rows,
    dependent_linears,
    gelu_mul,
    layout,
    linear,
    rms_norm,
    rotate,
    scale_rows,
    shift_rows,
    silu_mul,
)
from firstlight.kernels.torch.quantise import quantise

READS_BLOCKS = False
"""Whether linears compute from a file's own blocks (kernels/blocks.py)."""

__all__ = [
    "READS_BLOCKS",
    "Int8Linears",
    "PackedLinears",
    "add_norm",
    "add_rows",
    "attend",
    "attend_cuts",
    "dependent_linears",
    "gelu_mul",
    "layout",
    "linear",
    "quantise",
    "rms_norm",
    "rotate",
    "scale_rows",
    "shift_rows",
    "silu_mul",
]
