"""The compiled kernels as a library: what is loaded with them, and how a variant is forced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from firstlight.kernels.native import active_isa, lib

needs_lib = pytest.mark.skipif(lib is None, reason="no compiled kernels here: no compiler, or no x86-64")


def told(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@needs_lib
@pytest.mark.parametrize("order", ["firstlight.kernels._native, torch", "torch, firstlight.kernels._native"])
def test_one_openmp_runtime(order: str) -> None:
    """Two of them would run twice the threads, each spinning for its own."""
    maps = "print({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'omp5' in l or 'iomp' in l})"
    found = told(f"import {order}; {maps}")
    assert found.returncode == 0 and len(eval(found.stdout)) == 1, found.stdout + found.stderr


@needs_lib
def test_every_variant_can_be_forced() -> None:
    for isa in lib.variants():
        print_it = "from firstlight.kernels.native import active_isa; print(active_isa())"
        assert told(print_it, FIRSTLIGHT_ISA=isa).stdout.strip() == isa


@needs_lib
def test_a_variant_that_cannot_run_is_refused_by_name() -> None:
    code = "import sys; sys.argv = ['firstlight', 'run', 'x', '-p', 'hi']; import firstlight.cli.main as m; m.main()"
    found = told(code, FIRSTLIGHT_ISA="avx1024")
    assert found.returncode == 2 and "avx1024" in found.stderr and "Traceback" not in found.stderr, found.stderr


def test_without_compiled_kernels_torch_serves() -> None:
    code = (
        "import sys; sys.modules['firstlight.kernels._native'] = None\n"
        "from firstlight.kernels.dispatch import fastest; print(fastest(64).__name__)"
    )
    found = told(code)
    assert found.stdout.strip() == "firstlight.kernels.torch.backend" and "no compiled kernels" in found.stderr


@needs_lib
def test_the_fastest_is_taken() -> None:
    assert os.environ.get("FIRSTLIGHT_ISA", lib.variants()[0]) == active_isa()
