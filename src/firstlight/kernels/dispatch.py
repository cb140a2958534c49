"""Chooses a backend and prepares the process for it."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

from firstlight.kernels.native import active_isa, lib

log = logging.getLogger(__name__)
BACKENDS = ("reference", "torch", "cpu") if lib is not None else ("reference", "torch")
_CAP = "AVX512_CORE_BF16"
_WITH_BF16 = ("amx", "amx_model", "avx512_bf16")


def backend(name: str) -> ModuleType:
    """The operators of a backend: attend, rms_norm, rotate, silu_mul, linear."""
    return importlib.import_module(f"firstlight.kernels.{name}.backend")


def fastest(head_dim: int) -> ModuleType:
    """The backend that a run takes: the compiled one where it exists and takes heads of this size."""
    if lib is None:
        log.warning("no compiled kernels: using PyTorch's operators, which are slower; reinstall where g++ is at hand")
    elif head_dim % 16:
        log.warning("heads of %d are not a multiple of 16: using PyTorch's operators, which are slower", head_dim)
    elif active_isa() == "amx_model":
        log.warning("amx_model plays AMX's tiles in plain C++, a test of these kernels: slow; unset FIRSTLIGHT_ISA")
    return backend("torch" if lib is None or head_dim % 16 else "cpu")


def advise(precision: str) -> None:
    """Say what would be better than bf16 where bf16 has no products of its own and is multiplied as float32."""
    if precision == "bf16" and active_isa() not in _WITH_BF16:
        faster = "; int8 is faster" if "vnni" in str(active_isa()) else ""
        log.warning(
            "no bf16 products here (%s): --precision f32 reads prompts as fast, and more exactly%s",
            active_isa(),
            faster,
        )


def cap_instruction_set() -> None:
    """Keep oneDNN off AMX, whose blocking follows row and thread counts. Works until its first operator has run."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = _CAP
