"""The physical limit of this machine, measured: multiplications a second in each type, and memory read a second.

The rates are the best that any product reaches here (PyTorch's plain ones, oneDNN's with packed weights, our own), on
square matrices that stay in the caches; a data sheet's figure would be a promise. `limit_s` turns them into the time
that no prefill on this machine can beat.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from firstlight.kernels.cpu.linears import Panels
from firstlight.kernels.native import lib
from firstlight.models.config import ModelConfig

SIZE = 2048
READ_BYTES = 1 << 29
"""Far more than any cache holds."""
_REPEATS = 6
_HAS_ONEDNN = bool(torch._C._has_mkldnn)
TYPES = ("f32", "bf16", "int8")

Call = Callable[[], object]


def measure_peaks(threads: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each type and for memory, and each number of threads.

    {what, unit, threads, operator, first_call, steady}: `steady` is the best of some calls, `first_call` the same
    operator's first one, which also pays for preparing.
    """
    return [row for count in threads for row in _rows(count)]


def peak_gflops(kind: str) -> float:
    """The steady rate of one type on torch's present threads: the yardstick of MFU."""
    return float(_best(_products(kind), 2 * SIZE**3)["steady"])


def prefill_flops(config: ModelConfig, num_tokens: int) -> float:
    """Multiplications and additions of a dense prefill: linears of all rows, causal attention, the head on one row.

    Of a mixture's experts those that a row goes through, of a window layer the keys in the window.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = 3 * config.intermediate_size * max(config.num_experts_used, 1) + config.num_experts
    linears = config.hidden_size * (2 * q + 2 * kv + mlp)
    layers = config.num_layers * 2 * linears * num_tokens + attention_flops(config, num_tokens)
    return layers + 2 * config.hidden_size * config.vocab_size


def attention_flops(config: ModelConfig, num_tokens: int) -> float:
    """Of these what attention takes."""
    behind = (max(num_tokens - window, 0) if window else 0 for window in config.windows)
    pairs = sum(num_tokens * (num_tokens + 1) / 2 - hidden * (hidden + 1) / 2 for hidden in behind)
    return 4 * config.num_heads * config.head_dim * pairs


def limit_s(config: ModelConfig, num_tokens: int, gflops: float) -> float:
    """The least seconds that a dense prefill of so many tokens can take at a measured rate."""
    return prefill_flops(config, num_tokens) / (gflops * 1e9)


def _rows(threads: int) -> Iterator[dict[str, Any]]:
    with _threads(threads):
        for kind in TYPES:
            unit = "GOP/s" if kind == "int8" else "GFLOP/s"
            yield {"what": kind, "unit": unit, "threads": threads, **_best(_products(kind), 2 * SIZE**3)}
        memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        reads: dict[str, Call] = {"sum": memory.sum, "max": memory.max}
        yield {"what": "memory read", "unit": "GB/s", "threads": threads, **_best(reads, READ_BYTES)}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _products(kind: str) -> dict[str, Call]:
    """The ways to multiply two [SIZE, SIZE] matrices of a type, by name."""
    return _int8_products() if kind == "int8" else _float_products(torch.float32 if kind == "f32" else torch.bfloat16)


def _float_products(dtype: torch.dtype) -> dict[str, Call]:
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    products: dict[str, Call] = {"mm": lambda: torch.mm(a, b)}
    if _HAS_ONEDNN:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(b, SIZE)
        products["packed linear"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    return products | _own_product(a, b)


def _int8_products() -> dict[str, Call]:
    """Activations u8 with zero point 128 and bf16 out: the form that oneDNN has fast kernels for."""
    a = torch.randint(0, 256, (SIZE, SIZE), dtype=torch.uint8)
    b = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)
    products: dict[str, Call] = {"mm": lambda: torch._int_mm(a.view(torch.int8), b)}
    if _HAS_ONEDNN:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(b, [SIZE, SIZE])
        scales, zeros = torch.ones(SIZE), torch.zeros(SIZE, dtype=torch.int64)
        products["packed linear"] = lambda: torch.ops.onednn.qlinear_pointwise(
            a, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
    return products | _own_product(a, b, torch.ones(SIZE))


def _own_product(a: Tensor, b: Tensor, scale: Tensor | None = None) -> dict[str, Call]:
    panels = Panels(b, scale)
    return {} if lib is None else {"firstlight": lambda: panels(a)}


def _best(calls: dict[str, Call], work: float) -> dict[str, Any]:
    """The fastest of some operators that do the same work; rates in 10^9 a second."""
    seconds = {name: [_timed(call) for _ in range(_REPEATS)] for name, call in calls.items()}
    name = min(seconds, key=lambda n: min(seconds[n]))
    first, *rest = (work / s / 1e9 for s in seconds[name])
    return {"operator": name, "first_call": round(first, 1), "steady": round(max(first, *rest), 1)}


def _timed(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
