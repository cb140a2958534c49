"""Every setting of the engine, once: the texts here become `--help`, the docs and the keywords of `LLM`."""

# ruff: noqa: RUF009
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.registry import Method

PRECISIONS = ("bf16", "f32", "int8")
WEIGHTS = ("default", "compact")
INT8_PARTS = ("linears", "kv")
"""What `int8` rounds to 8 bits, each of which it can leave in bf16: `kv` is K/V and attention over them."""
MAX_THREADS = 1024
"""More than any machine has cores. Some tens of thousands would bring OpenMP down."""


def _opt(default: Any, doc: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"doc": doc, "metavar": metavar})


@dataclass(frozen=True)
class Options:
    """How a model is run. The defaults are exact."""

    method: Sequence[Method | str] = _opt(
        (), "switch a method on (repeatable); see `firstlight methods list`", "NAME:key=value"
    )
    schedule: Method | str = _opt("sarathi", "the order in which cells are computed", "NAME:key=value")
    prefix_cache: str = _opt("on", "reuse the KV of equal prompt beginnings: on or off", "on|off")
    precision: str = _opt(
        "bf16",
        "compute type: bf16 or f32, both exact; int8: linears, attention and KV in 8 bits, or one of the two: "
        "int8:kv=bf16, int8:linears=bf16",
        "f32|bf16|int8",
    )
    weights: str = _opt(
        "default",
        "what stays in memory: weights in the compute type, or, compact, the GGUF file's own blocks: the same answers "
        "from a quarter of the memory",
        "default|compact",
    )
    threads: int | None = _opt(None, "CPU threads; default: all cores this process may use")
    max_model_len: int | None = _opt(None, "longest prompt plus answer in tokens; default: the model's context")
    max_num_seqs: int = _opt(16, "requests that run at once")
    max_num_batched_tokens: int = _opt(2048, "rows of one pass while several requests run")
    kv_memory: str | None = _opt(
        None,
        "memory for KV, such as 2GiB; default: what the two limits above need, at most 0.6 of what is free",
        "BYTES",
    )
    device: str = _opt("cpu", "where to compute; this version has cpu")
    deterministic: bool = _opt(False, "make bits independent of batch, chunk, cache and threads")
    event_log: str | None = _opt(None, "write the run's events and plans, for `firstlight simulate --replay`", "FILE")
    seed: int = _opt(0, "seed of requests that bring none")
    config: str | None = _opt(
        None,
        "settings in TOML, weaker than flags and variables; default: $FIRSTLIGHT_CONFIG or ~/.config/firstlight.toml",
        "FILE",
    )

    def __post_init__(self) -> None:
        int8 = int8_parts(self.precision)
        if self.weights not in WEIGHTS:
            raise UserError(f"weights={self.weights!r} is unknown; choose {', '.join(WEIGHTS)}")
        if self.weights == "compact" and "linears" in int8:
            raise UserError(
                "weights='compact' computes linears in bf16 or f32; choose one of these with precision, or "
                "int8:linears=bf16"
            )
        if self.prefix_cache not in ("on", "off"):
            raise UserError(f"prefix_cache={self.prefix_cache!r}: a cache on disk is not built yet; choose on or off")
        if any(method.name == "auto" for method in self.methods):
            raise UserError("method 'auto' is not built yet; name one of `firstlight methods list`")
        if self.device != "cpu":
            raise UserError(f"device={self.device!r} is unknown; this version computes on cpu")
        for key in ("threads", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value} is out of range; give 1 or more")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UserError(f"threads={self.threads} is out of range; give 1 to {MAX_THREADS}")
        parse_bytes(self.kv_memory)

    @property
    def compute(self) -> str:
        """The type of activations, and of what isn't in 8 bits: a key of `engine.build.DTYPES`."""
        return "f32" if self.precision == "f32" else "bf16"

    @property
    def methods(self) -> list[Method]:
        return [as_method(m) for m in self.method]


def int8_parts(precision: str) -> frozenset[str]:
    """Which of `INT8_PARTS` a precision has in 8 bits; UserError if there is no such precision."""
    name, _, rest = precision.partition(":")
    if name not in PRECISIONS:
        raise UserError(f"precision={precision!r} is unknown; choose {', '.join(PRECISIONS)}")
    left = {f"{part}=bf16": part for part in INT8_PARTS} if name == "int8" else {}
    words = rest.split(",") if rest else []
    if (":" in precision and not words) or any(word not in left for word in words):
        raise UserError(
            f"can't read precision={precision!r}; choose {', '.join(PRECISIONS)}, int8:kv=bf16 or int8:linears=bf16"
        )
    parts = frozenset(left.values()) - {left[word] for word in words}
    if name == "int8" and not parts:
        raise UserError(f"precision={precision!r} leaves nothing in 8 bits; choose bf16")
    return parts


def as_method(method: Method | str) -> Method:
    return method if isinstance(method, Method) else Method.parse(method)


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}


def parse_bytes(text: str | None) -> int | None:
    """`2GiB`, `512MB`, `1000000` -> bytes. Raises UserError on anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None:
        raise UserError(f"can't read the size {text!r}; write it like 2GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_bytes(count: float) -> str:
    """Bytes for people: `22.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
