"""Chooses a backend and prepares the process for it."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

BACKENDS = ("reference", "torch")
_CAP = "AVX512_CORE_BF16"


def backend(name: str) -> ModuleType:
    """The operators of a backend: attend, rms_norm, rotate, silu_mul, linear."""
    return importlib.import_module(f"firstlight.kernels.{name}.backend")


def cap_instruction_set() -> None:
    """Keep oneDNN off AMX, whose blocking follows row and thread counts. Works until its first operator has run."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = _CAP
