"""The machine that a figure was measured on: a speed without it says nothing."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import firstlight

_ISA = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, instruction set, usable cores, memory in GiB, versions, and the measured peaks in GFLOP/s."""
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "cpu": _value(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "isa": instruction_set(cpuinfo),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "firstlight": firstlight.__version__,
        "commit": commit(),
        "peak_gflops": {"f32": peak_gflops(torch.float32), "bf16": peak_gflops(torch.bfloat16)},
    }


def instruction_set(cpuinfo: str) -> str:
    """The widest set in /proc/cpuinfo's flags that kernels care for: amx, avx512_bf16, avx512, avx2, neon or base."""
    flags = set((_value(cpuinfo, "flags") or _value(cpuinfo, "Features")).split())
    return next((name for flag, name in _ISA.items() if flag in flags), "base")


def commit() -> str | None:
    """The checkout that this package runs from, `-dirty` if it was edited; None for an installed package."""
    package = Path(firstlight.__file__).parent
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        in_checkout = package.resolve() == Path(top, "src", "firstlight").resolve()
        return _git(package, "describe", "--always", "--dirty", "--abbrev=12") if in_checkout else None
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_gflops(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """The best of some products of square matrices on torch's present threads: the yardstick of MFU."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return round(2 * size**3 / min(_timed(a, b, out) for _ in range(repeats + 1)) / 1e9, 1)


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def _timed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    return time.perf_counter() - began


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
