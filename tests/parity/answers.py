"""How the parity tests ask a backend, and when two answers count as the same.

Tolerances. Float32: 2e-5. Bfloat16, whose inputs both sides share: 1e-2 + 2^-7 of the value on outputs (their rounding
and that of the weights), 1e-3 on log-sum-exps and probe sums, which stay in float32. Int8 blocks, whose bytes both
sides share, and queries rounded by each: 2e-2 on outputs (a weight is off by a 510th of its block's largest), 1e-2 on
log-sum-exps (a byte of a query may fall to the other side). Laws about bits hold exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from cases import fresh

from firstlight.kernels import dispatch
from firstlight.kernels.contract import AttnCall
from firstlight.kernels.native import lib

F32, BF16 = torch.float32, torch.bfloat16
_FORCED = os.environ.get("FIRSTLIGHT_ISA")
VARIANTS = [f"cpu:{isa}" for isa in lib.variants() if isa == (_FORCED or isa)] if lib is not None else []
each_backend = pytest.mark.parametrize("name", ["torch", *VARIANTS])
"""PyTorch's operators, and the compiled ones for every instruction set that this processor has,
or for the one that FIRSTLIGHT_ISA forces."""
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16])
each_blocks = pytest.mark.parametrize(("dtype", "int8"), [(F32, False), (BF16, False), (BF16, True)])
"""Of rows, and whether blocks are int8."""


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def backend(name: str) -> ModuleType:
    """Operators by backend, or by `cpu:<instruction set>`, which is in force until the next call."""
    kind, _, isa = name.partition(":")
    assert not isa or lib.choose(isa)
    return dispatch.backend(kind)


def run(name: str, call: AttnCall, cuts: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> AttnCall:
    """A fresh copy of the call, answered by a backend in slices that end at `cuts`."""
    call = fresh(call, dtype)
    ends = [*sorted(cuts), call.q.shape[0]]
    for r0, r1 in pairwise([0, *ends]):
        backend(name).attend(call, r0, r1)
    return call


def judge(call: AttnCall) -> AttnCall:
    return run("reference", call, dtype=F32)


def sums(call: AttnCall) -> list[torch.Tensor]:
    return [] if call.probe is None else [c for c in call.probe.colsum if c is not None]


def assert_agrees(got: AttnCall, want: AttnCall) -> None:
    int8, loose = got.layout.is_int8, got.q.dtype == BF16 or got.layout.is_int8
    atol = 2e-2 if int8 else 1e-3 if loose else 2e-5  # weights of bytes are powers of two in steps of 1/32
    out_atol = 3e-2 if int8 else 1e-2 if loose else atol
    torch.testing.assert_close(got.out.float(), want.out, atol=out_atol, rtol=2**-7 if loose else 1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=atol, rtol=1e-5)
    for a, b in zip(sums(got), sums(want), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)
    assert got.stats == want.stats


def assert_same_bits(got: AttnCall, want: AttnCall) -> None:
    for a, b in zip([got.out, got.lse, *sums(got)], [want.out, want.lse, *sums(want)], strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    assert got.stats == want.stats
