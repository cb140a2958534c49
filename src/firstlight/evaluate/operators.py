"""Each operator of a model's layers by itself: beside PyTorch's, and beside the time that this machine needs at least.

Operands come from memory, not from a cache: calls go round copies of them. The least time is that of the operations at
the measured rate of their type, or that of the bytes at which memory was read, whichever is longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.dispatch import backend, fastest
from firstlight.kernels.kv_layout import KVLayout
from firstlight.models.config import ModelConfig

Call = Callable[[], object]
_COLD_BYTES = 64 << 20
"""Of operands' copies together: more than a core's caches hold."""
_MOST_COPIES = 48
_SECONDS = 0.15
"""Of calls, for each operator and engine."""
_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One operator on one shape."""

    operator: str
    shape: str
    precision: str
    rows: int
    operations: float
    nbytes: float
    ours: Call
    torch: Call


def measure_operators(
    config: ModelConfig, rows: Sequence[int], context: int, peaks: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """A row for each operator, shape, type and number of rows, on torch's present threads.

    `peaks`: 10^9 operations a second of each type, and bytes of "memory read". A row has the best seconds of our call
    and of PyTorch's, and `limit_s`.
    """
    if min(rows, default=0) < 1 or context < 1:
        raise UserError("an operator needs rows and a context to run on; give numbers of 1 or more")
    with torch.inference_mode():
        for case in _cases(config, rows, context):
            ours, theirs = _best([case.ours, case.torch])
            limit = max(case.operations / peaks[case.precision], case.nbytes / peaks["memory read"]) / 1e9
            yield {
                **{key: getattr(case, key) for key in ("operator", "shape", "precision", "rows")},
                **{"seconds": ours, "torch_s": theirs, "limit_s": limit},
            }


def _best(calls: Sequence[Call]) -> list[float]:
    """The shortest time of each, taken in turn after one warm-up."""
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + _SECONDS * len(calls)
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def _cases(config: ModelConfig, rows: Sequence[int], context: int) -> Iterator[Case]:
    ops = fastest(config.head_dim)
    shapes = _linear_shapes(config)
    for n in rows:
        for name, (outputs, width) in shapes.items():
            yield _linear(ops, name, n, outputs, width)
            if name != "head" and torch.cpu._is_vnni_supported():
                yield _int8_linear(ops, name, n, outputs, width)
    for n in dict.fromkeys((1, context)):
        yield _attention(ops, config, n, context)
    for n in rows:
        yield from _row_operators(ops, config, n)


def _linear_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of a layer's linears, those of one expert where there are some, and of the head."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "qkv": (q + 2 * kv, c.hidden_size),
        "o": (c.hidden_size, q),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "head": (c.vocab_size, c.hidden_size),
    }


def _copies(nbytes: float) -> int:
    return int(min(max(_COLD_BYTES / nbytes, 1), _MOST_COPIES))


def _in_turn(one: Callable[..., object], operands: Sequence[Any], *rest: object) -> Call:
    turn = cycle(operands)
    return lambda: one(next(turn), *rest)


def _linear(ops: Any, name: str, n: int, outputs: int, width: int) -> Case:
    w, x = torch.randn(outputs, width).to(_BF16), torch.randn(n, width).to(_BF16)
    names = [str(i) for i in range(_copies(w.nbytes))]
    ours, theirs = (made.PackedLinears((i, w) for i in names) for made in (ops, backend("torch")))
    moved = w.nbytes + x.nbytes + 2 * n * outputs
    calls = (_in_turn(run, names, x) for run in (ours, theirs))
    return Case(f"linear {name}", f"{width} -> {outputs}", "bf16", n, 2.0 * n * outputs * width, moved, *calls)


def _int8_linear(ops: Any, name: str, n: int, outputs: int, width: int) -> Case:
    w = torch.randn(outputs, width).to(_BF16)
    names = [str(i) for i in range(_copies(w.nbytes / 2))]
    ours, theirs = (made.Int8Linears(((i, w) for i in names), {}, (), ops) for made in (ops, backend("torch")))
    x = ops.quantise(torch.randn(n, width).to(_BF16), torch.ones(width))
    moved = w.nbytes / 2 + n * width + 2 * n * outputs
    calls = (_in_turn(run.scaled, names, x) for run in (ours, theirs))
    return Case(f"linear {name}", f"{width} -> {outputs}", "int8", n, 2.0 * n * outputs * width, moved, *calls)


def _attention(ops: Any, c: ModelConfig, n: int, context: int) -> Case:
    """The last n of `context` rows over all of them."""
    each = 4 * c.num_kv_heads * c.head_dim * context
    copies = range(_copies(each))
    q = torch.randn(n, c.num_heads, c.head_dim).to(_BF16)
    k, v = (torch.randn(context, c.num_kv_heads, c.head_dim).to(_BF16) for _ in range(2))
    calls = [_attend_call(q, k, v) for _ in copies]
    heads = [[t.clone().transpose(0, 1)[None] for t in (q, k, v)] for _ in copies]
    pairs = n * (context - n) + n * (n + 1) / 2
    return Case(
        "attention",
        f"{c.num_heads}/{c.num_kv_heads} x {c.head_dim} over {context}",
        "bf16",
        n,
        4.0 * c.num_heads * c.head_dim * pairs,
        each + 2 * q.nbytes,
        _in_turn(ops.attend, calls, 0, n),
        _in_turn(_torch_attention, heads),
    )


def _torch_attention(qkv: Sequence[Tensor]) -> Tensor:
    """q, k, v [1, H, n, D]: n is 1 or the whole context."""
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def _attend_call(q: Tensor, k: Tensor, v: Tensor) -> AttnCall:
    (n, _, dim), (context, kv_heads, _) = q.shape, k.shape
    table, layout = KVLayout.holding(k, v)
    entry = torch.arange(context)
    rows = AttnRows([0, n], entry[context - n :].clone(), entry[context - n :].clone(), [n == 1])
    return AttnCall(q, rows, layout, [KVView(table, [context] * kv_heads)], torch.empty_like(q), dim**-0.5)


def _row_operators(ops: Any, c: ModelConfig, n: int) -> Iterator[Case]:
    """Norm and gate, into bf16 and into bytes, and rotation: nothing to speak of but memory."""
    hidden, ffn, heads = c.hidden_size, c.intermediate_size, c.num_heads + c.num_kv_heads
    gain, delta = torch.ones(hidden), torch.randn(n, hidden).to(_BF16)
    for precision, out in (("bf16", 2), ("int8", 1)):
        smooth = None if precision == "bf16" else torch.ones(max(hidden, ffn))
        norm, gate = (None if smooth is None else smooth[:width] for width in (hidden, ffn))
        yield _row_case(
            *("add_norm", n, hidden, precision, torch.randn(n, hidden), 4 + 4 + 2 + out),
            *(lambda x, made, norm=norm: made.add_norm(x, delta, gain, 1e-5, _BF16, None, norm), ops),
        )
        yield _row_case(
            *("silu_mul", n, ffn, precision, torch.randn(n, 2 * ffn).to(_BF16), 4 + out),
            *(lambda x, made, gate=gate: made.silu_mul(x, None, gate), ops),
        )
    angle = torch.randn(n, c.head_dim)
    yield _row_case(
        *("rotate", n, heads * c.head_dim, "bf16", torch.randn(n, heads, c.head_dim).to(_BF16), 4),
        *(lambda x, made: made.rotate(x, angle, angle), ops),
    )


def _row_case(
    name: str, n: int, width: int, precision: str, x: Tensor, each: int, run: Callable[..., object], ops: Any
) -> Case:
    """`each`: bytes that are read and written for every output."""
    operands = [x.clone() for _ in range(_copies(x.nbytes))]
    calls = (_in_turn(run, operands, made) for made in (ops, backend("torch")))
    return Case(name, f"{width}", precision, n, 0.0, float(each * n * width), *calls)
