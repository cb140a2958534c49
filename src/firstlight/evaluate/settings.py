"""Settings that are judged side by side: their names, and the controls that a method has to beat.

A setting is written as it is printed: methods and a precision joined by ` + `, as in `band:window=512 + int8`; `dense`
is no method, and bf16 goes without saying.

Controls know nothing of the prompt, or look at words only. They get what the method got: `band` (A-shape) reads as many
keys as it did, `truncate` and `bm25` leave so much of the context that a dense pass over the rest takes its arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from firstlight.core.config import PRECISIONS, Options
from firstlight.core.errors import UserError
from firstlight.core.registry import Method, make_parts
from firstlight.evaluate.peak import attention_flops, prefill_flops
from firstlight.models.config import ModelConfig

DENSE, AND = "dense", " + "
SINK, STEP = 64, 64
"""Tokens of the control's sink; its window is a multiple of so many."""


def dense_of(options: Options) -> Options:
    """What a setting is compared with: no method, the default precision, all else equal."""
    return replace(options, method=(), precision="bf16")


def name_of(options: Options) -> str:
    """A setting in a few words."""
    methods = [f"{m.name}{':' * bool(m.settings)}{_settings_text(m.settings)}" for m in options.methods]
    precision = [] if options.precision == "bf16" else [options.precision]
    return AND.join([*(methods or [DENSE]), *precision])


def setting_of(options: Options, text: str) -> Options:
    """The setting of a text, all else as in `options`. Raises UserError on what it can't be."""
    words = [word.strip() for word in text.split(AND)]
    precisions = [word for word in words if word.partition(":")[0] in PRECISIONS]
    methods = [Method.parse(word) for word in words if word not in (*precisions, DENSE)]
    if len(precisions) > 1 or not all(words):
        raise UserError(f"can't read the setting {text!r}; write it like band:window=512 + int8, or dense")
    make_parts(methods)
    return replace(options, method=methods, precision=(precisions or ["bf16"])[0])


def effect_of(options: Options) -> tuple[Any, ...]:
    """What a setting does: equal for two that say the same in other words."""
    return options.precision, *((part.method, part.seam, part.config) for part in make_parts(options.methods))


def is_edited(options: Options) -> bool:
    """Whether a method takes tokens out of prompts."""
    return any(part.seam == "prompt" for part in make_parts(options.methods))


def controls(options: Options, density: float, computed: float, length: int, config: ModelConfig) -> list[Options]:
    """The controls of a method that read `density` of all keys and computed so much of the cells at a length."""
    plain, windows = dense_of(options), config.windows
    found = [replace(plain, precision="f32"), replace(plain, precision="int8")]
    window = _window_at(density, length, windows)
    if window is not None:
        found.append(replace(plain, method=(Method("band", sink=SINK, window=window),)))
    share = attention_flops(config, length) / prefill_flops(config, length)
    work = (1 - share) * computed + share * density / _density(length, length, windows)
    rate = round(_kept_at(work, share), 2)
    if 0 < rate < 1:
        found += [replace(plain, method=(Method(name, rate=rate),)) for name in ("truncate", "bm25")]
    return found


def _window_at(density: float, length: int, windows: Sequence[int | None]) -> int | None:
    """The window at which `band` reads as many keys; None where it would be dense."""
    reads = [_density(SINK + window, length, windows) for window in range(STEP, length - SINK, STEP)]
    nearest = min(range(len(reads)), key=lambda i: abs(reads[i] - density), default=None)
    if nearest is None or abs(1 - density) < abs(reads[nearest] - density):
        return None
    return STEP * (nearest + 1)


def _density(most: int, length: int, windows: Sequence[int | None]) -> float:
    """Keys read of a causal triangle, when a row reads `most` of them; averaged over layers."""
    reads = [min(window or most, length) for window in windows]  # the model's own windows aren't planned
    pairs = [m * (m + 1) / 2 + (length - m) * m for m in reads]
    return sum(pairs) / len(pairs) / (length * (length + 1) / 2)


def _kept_at(work: float, share: float) -> float:
    """The share r of tokens whose dense prefill takes `work` of the whole one's: (1 - share) r + share r^2 = work."""
    if share == 0:
        return work
    linear = 1 - share
    return (math.sqrt(linear**2 + 4 * share * work) - linear) / (2 * share)


def _settings_text(settings: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())
