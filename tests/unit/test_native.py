"""The compiled kernels as a library: what is loaded with them, and how a variant is forced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from firstlight.kernels.dispatch import fastest
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
@pytest.mark.parametrize("isa", ["avx1024", "amx"])
def test_a_variant_that_cannot_run_is_refused_by_name(isa: str) -> None:
    if isa in lib.variants():
        pytest.skip(f"this processor runs {isa}")
    code = "import sys; sys.argv = ['firstlight', 'run', 'x', '-p', 'hi']; import firstlight.cli.main as m; m.main()"
    found = told(code, FIRSTLIGHT_ISA=isa)
    assert found.returncode == 2 and f"'{isa}' can't run here" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


@needs_lib
def test_what_the_processor_has_is_used() -> None:
    """Each variant where its instructions are, the fastest first; the model of tiles last, and only by name."""
    flags = set(
        next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    )
    narrow, wide = {"avx2", "fma"}, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    bytes_, dots = wide | {"avx512_vnni"}, wide | {"avx512_vnni", "avx512_bf16"}
    needed = {
        "amx": dots | {"amx_tile", "amx_bf16", "amx_int8"},
        "avx512_bf16": dots,
        "avx512_vnni": bytes_,
        "avx512": wide,
        "avx2_vnni": narrow | {"avx_vnni"},
        "avx2": narrow,
        "portable": set[str](),
        "amx_model": dots,
    }
    assert lib.variants() == [isa for isa, of in needed.items() if of <= flags]


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


@needs_lib
def test_heads_that_the_kernels_lack_are_torchs_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert fastest(48).__name__ == "firstlight.kernels.cpu.backend"
    assert fastest(24).__name__ == "firstlight.kernels.torch.backend"
    assert "heads of 24 are not a multiple of 16" in caplog.text


@needs_lib
@pytest.mark.parametrize(("isa", "precision", "said"), [("avx2", "bf16", True), ("avx2", "f32", False)])
def test_bf16_without_bf16_products_is_advised_against(isa: str, precision: str, said: bool) -> None:
    code = f"from firstlight.kernels.dispatch import advise; advise({precision!r})"
    assert ("--precision f32 reads prompts as fast" in told(code, FIRSTLIGHT_ISA=isa).stderr) is said


@needs_lib
def test_bf16_with_bf16_products_needs_no_advice() -> None:
    if lib.variants()[0] not in ("amx", "avx512_bf16"):
        pytest.skip("this processor has none")
    assert told("from firstlight.kernels.dispatch import advise; advise('bf16')").stderr == ""
