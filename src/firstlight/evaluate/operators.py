"""Each operator of a model's layers by itself: beside PyTorch's, and beside the time that this machine needs at least.

Operands come from memory, not from a cache: calls go round copies of them. The least time is that of the operations at
the measured rate of their type, or that of the bytes at which memory was read, whichever is longer. PyTorch's operator
is the one that reads the same bytes: it has none over K/V in 8 bits, and of a file's blocks only for 4 bits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.kernels.blocks import TYPES, Stored, unpacked
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.dispatch import backend, fastest
from firstlight.kernels.kv_layout import BLOCK, Int8Layout, KVLayout
from firstlight.models.config import ModelConfig
from firstlight.models.weights.gguf import TYPES as SIZES

Call = Callable[[], object]
_COLD_BYTES = 64 << 20
"""Of operands' copies together: more than a core's caches hold."""
_MOST_COPIES = 48
_SECONDS = 0.15
"""Of calls, for each operator and engine."""
_BF16 = torch.bfloat16
_INT4_GROUP = 32
"""Weights that share a scale in PyTorch's 4-bit product: as in the blocks that it is set beside."""
_JOINED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("lm_head",),
}
"""A linear's tensors by the last word of their names: a tied head's is the embedding."""


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
    torch: Call | None
    """None where PyTorch has no such operator."""
    blocks: str = field(default="", kw_only=True)
    """Types of the blocks that a linear computes from."""


def measure_operators(
    config: ModelConfig,
    rows: Sequence[int],
    context: int,
    peaks: Mapping[str, float],
    types: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each operator, shape, type and number of rows, on torch's present threads.

    `peaks`: 10^9 operations a second of each type, and bytes of "memory read". `types`: of the model's tensors, as
    their file has them. A row has the best seconds of our call and of PyTorch's, None if it has no such operator, and
    `limit_s`.
    """
    if min(rows, default=0) < 1 or context < 1:
        raise UserError("an operator needs rows and a context to run on; give numbers of 1 or more")
    with torch.inference_mode():
        for case in _cases(config, rows, context, types or {}):
            ours, *theirs = _best([case.ours, case.torch] if case.torch else [case.ours])
            limit = max(case.operations / peaks[case.precision], case.nbytes / peaks["memory read"]) / 1e9
            yield {
                **{key: getattr(case, key) for key in ("operator", "shape", "precision", "blocks", "rows")},
                **{"seconds": ours, "torch_s": theirs[0] if theirs else None, "limit_s": limit},
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


def _cases(config: ModelConfig, rows: Sequence[int], context: int, types: Mapping[str, str]) -> Iterator[Case]:
    ops, has_int8 = fastest(config.head_dim), torch.cpu._is_vnni_supported()
    shapes, stored = _linear_shapes(config), _block_types(types) if types and ops.READS_BLOCKS else {}
    for n in rows:
        for name, (outputs, width) in shapes.items():
            yield _linear(ops, name, n, outputs, width)
            if name in stored:
                yield _block_linear(ops, name, n, _shares(config, name), width, stored[name])
            if name != "head" and has_int8:
                yield _int8_linear(ops, name, n, outputs, width)
    for layout in (KVLayout, Int8Layout) if has_int8 else (KVLayout,):
        for n in dict.fromkeys((1, context)):
            yield _attention(ops, config, n, context, layout)
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


def _shares(c: ModelConfig, name: str) -> tuple[int, ...]:
    """Outputs of each of a linear's tensors."""
    outputs, kv = _linear_shapes(c)[name][0], c.num_kv_heads * c.head_dim
    joined = {"qkv": (c.num_heads * c.head_dim, kv, kv), "gate_up": (c.intermediate_size,) * 2}
    return joined.get(name, (outputs,))


def _block_types(types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Of linears whose tensors are blocks: the type that most layers have, tensor by tensor."""
    tied = {} if "lm_head.weight" in types else {"lm_head": types["model.embed_tokens.weight"]}
    found: dict[str, Counter[str]] = {word: Counter([kind]) for word, kind in tied.items()}
    for name, kind in types.items():
        found.setdefault(name.split(".")[-2], Counter())[kind] += 1
    commonest = {word: counts.most_common(1)[0][0] for word, counts in found.items()}
    made = {name: tuple(commonest[word] for word in words) for name, words in _JOINED.items()}
    return {name: kinds for name, kinds in made.items() if TYPES.issuperset(kinds)}


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


def _block_linear(ops: Any, name: str, n: int, shares: Sequence[int], width: int, kinds: Sequence[str]) -> Case:
    joined = [_blocks(kind, outputs, width) for kind, outputs in zip(kinds, shares, strict=True)]
    nbytes, outputs, x = sum(w.raw.nbytes for w in joined), sum(shares), torch.randn(n, width).to(_BF16)
    made, names = ops.PackedLinears(), [str(i) for i in range(_copies(nbytes))]
    parts = made.parts(name, joined)
    for copy in names:
        made.take(copy, {part: tensor.clone() for part, tensor in parts.items()})
    return Case(
        *(f"linear {name}", f"{width} -> {outputs}", "bf16", n, 2.0 * n * outputs * width),
        *(nbytes + x.nbytes + 2 * n * outputs, _in_turn(made, names, x), _torch_int4(joined, x)),
        blocks="+".join(dict.fromkeys(kinds)),
    )


def _blocks(kind: str, outputs: int, width: int) -> Stored:
    """Random bytes [O, bytes of a row], none above 63, so that all their float16 are finite."""
    count, size = next((count, size) for name, count, size in SIZES.values() if name == kind)
    return Stored(kind, torch.randint(0, 64, (outputs, width // count * size), dtype=torch.uint8), _BF16)


def _torch_int4(joined: Sequence[Stored], x: Tensor) -> Call | None:
    """PyTorch's product from weights of 4 bits: scales and zeros are bf16, one of each for 32 weights."""
    parts = [unpacked(stored) for stored in joined]
    if any(w.bits != 4 for w in parts):
        return None
    q = torch.cat([w.q for w in parts])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    scales = torch.rand(q.shape[1] // _INT4_GROUP, len(q), 2).to(_BF16)
    copies = [(packed.clone(), scales.clone()) for _ in range(_copies(packed.nbytes + scales.nbytes))]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _in_turn(lambda w: product(x, w[0], _INT4_GROUP, w[1]), copies)


def _attention(ops: Any, c: ModelConfig, n: int, context: int, kind: type[KVLayout]) -> Case:
    """The last n of `context` rows over all of them."""
    each = c.num_kv_heads * context / BLOCK * kind.block_nbytes(c.head_dim, _BF16)
    copies = range(_copies(each))
    q = torch.randn(n, c.num_heads, c.head_dim).to(_BF16)
    k, v = (torch.randn(context, c.num_kv_heads, c.head_dim).to(_BF16) for _ in range(2))
    calls = [_attend_call(q, k, v, kind) for _ in copies]
    heads = [[t.clone().transpose(0, 1)[None] for t in (q, k, v)] for _ in copies]
    pairs = n * (context - n) + n * (n + 1) / 2
    return Case(
        "attention",
        f"{c.num_heads}/{c.num_kv_heads} x {c.head_dim} over {context}",
        "int8" if kind.is_int8 else "bf16",
        n,
        4.0 * c.num_heads * c.head_dim * pairs,
        each + 2 * q.nbytes,
        _in_turn(ops.attend, calls, 0, n),
        None if kind.is_int8 else _in_turn(_torch_attention, heads),
    )


def _torch_attention(qkv: Sequence[Tensor]) -> Tensor:
    """q, k, v [1, H, n, D]: n is 1 or the whole context."""
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def _attend_call(q: Tensor, k: Tensor, v: Tensor, kind: type[KVLayout]) -> AttnCall:
    (n, _, dim), (context, kv_heads, _) = q.shape, k.shape
    table, layout = kind.holding(k, v)
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
