"""The compiled kernels of csrc/, if this installation and this processor have them.

`FIRSTLIGHT_ISA` forces a variant: amx, avx512_bf16, avx512_vnni, avx512, avx2_vnni, avx2 or portable. By default the
fastest that the processor can run is taken. `amx_model` is amx with its tiles played in plain C++: slow, for tests of
these kernels.
"""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from types import ModuleType

from firstlight.core.errors import UserError


def _load() -> ModuleType | None:
    try:
        module = importlib.import_module("firstlight.kernels._native")
    except ImportError:  # built without a compiler, or for another processor
        return None
    wanted = os.environ.get("FIRSTLIGHT_ISA")
    if wanted and not module.choose(wanted):
        raise UserError(f"FIRSTLIGHT_ISA={wanted!r} can't run here; choose one of: {', '.join(module.variants())}")
    return module


lib = _load()


def active_isa() -> str | None:
    """The variant in use; None if there are no compiled kernels."""
    return None if lib is None else str(lib.active())


def processor() -> str:
    """The processor as it calls itself."""
    try:
        facts = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        facts = []
    named = (value.strip() for key, _, value in facts if key.strip() == "model name")
    return next(named, "") or platform.processor() or platform.machine()
