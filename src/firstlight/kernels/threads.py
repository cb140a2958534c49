"""Threads on cores of their own while a pass runs (decision 0006)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from firstlight.kernels.native import lib

_CHOSEN_BY_USER = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


@contextlib.contextmanager
def bound() -> Iterator[None]:
    """This thread and those that compute for it stay on cores of their own, if there is one for each and none is left.

    With fewer threads than cores nothing is bound: two processes would choose the same cores and leave others empty.
    """
    if lib is None or torch.get_num_threads() != len(cores()) or not lib.bind(cores()):
        yield
        return
    try:
        yield
    finally:
        lib.unbind()


@functools.cache
def cores() -> list[list[int]]:
    """The CPUs of each physical core that this process may run on; none where somebody has bound threads already."""
    if any(name in os.environ for name in _CHOSEN_BY_USER) or not hasattr(os, "sched_getaffinity"):
        return []
    found: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else str(cpu), []).append(cpu)
    return list(found.values())
