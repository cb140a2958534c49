"""The machine that a figure was measured on: a speed without it says nothing."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

import firstlight
from firstlight.evaluate.peak import TYPES, peak_gflops
from firstlight.kernels.dispatch import BACKENDS
from firstlight.kernels.native import active_isa, processor

_ISA = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx512f": "avx512",
    "avx_vnni": "avx2_vnni",
    "avx2": "avx2",
    "asimd": "neon",
}


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, instruction set, usable cores, memory in GiB, versions, and the measured peaks in GFLOP/s."""
    return {**describe_processor(), "threads": threads, "peak_gflops": {kind: peak_gflops(kind) for kind in TYPES}}


def describe_processor() -> dict[str, Any]:
    """All of `describe_machine` that needs no measurement, and the kernels that a run would take here."""
    return {
        "cpu": processor(),
        "isa": instruction_set(_read("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "kernels": kernels(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "firstlight": firstlight.__version__,
        "commit": commit(),
    }


def instruction_set(cpuinfo: str) -> str:
    """The widest set in /proc/cpuinfo's flags that kernels care for, by a kernel variant's name, neon or base."""
    flags = set((_value(cpuinfo, "flags") or _value(cpuinfo, "Features")).split())
    return next((name for flag, name in _ISA.items() if flag in flags), "base")


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 itself; without, engines emulate it in float32."""
    return instruction_set(_read("/proc/cpuinfo")) in ("amx", "avx512_bf16")


def kernels() -> str:
    """The backend that a run of this process takes, and the variant of compiled kernels that this processor gets."""
    variant = active_isa()
    return BACKENDS[-1] if variant is None else f"{BACKENDS[-1]} ({variant})"


def commit() -> str | None:
    """The checkout that this package runs from, `-dirty` if it was edited; None for an installed package."""
    package = Path(firstlight.__file__).parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        in_checkout = package.resolve() == Path(top, "src", "firstlight").resolve()
        return _git(package, "describe", "--always", "--dirty", "--abbrev=12") if in_checkout else None
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _value(cpuinfo: str, key: str) -> str:
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
