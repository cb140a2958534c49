"""The compiled backend's operators under their common names."""

from __future__ import annotations

from firstlight.kernels.cpu.attention import attend, attend_cuts, layer_numbers, plan_numbers, view_numbers
from firstlight.kernels.cpu.linears import Int8Linears, PackedLinears, layout, linear
from firstlight.kernels.cpu.ops import (
    add_norm,
    add_rows,
    gelu_mul,
    quantise,
    rms_norm,
    rotate,
    scale_rows,
    shift_rows,
    silu_mul,
)
from firstlight.kernels.torch.ops import dependent_linears

READS_BLOCKS = True
"""Linears compute from a file's own blocks (kernels/blocks.py), where they are given these."""

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
    "layer_numbers",
    "layout",
    "linear",
    "plan_numbers",
    "quantise",
    "rms_norm",
    "rotate",
    "scale_rows",
    "shift_rows",
    "silu_mul",
    "view_numbers",
]
