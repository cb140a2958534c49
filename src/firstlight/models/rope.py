"""RoPE frequencies: how fast each pair of a head turns with the position, and how that is stretched to more context.

RoFormer, arXiv 2104.09864; the scalings are those that model files name: `linear` (arXiv 2306.15595), `llama3` (Llama
3.1's), `yarn` (arXiv 2309.00071), `longrope` (arXiv 2402.13753), and `factors`, the divisors that a GGUF file stores.
A scaling never looks at a request: which of its two lists `longrope` uses follows from the context that the engine
serves, or else a token's cells would depend on what comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.models.fields import Fields

_ORIGINAL = "original_max_position_embeddings"


def rope_table(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_context: int, served: int
) -> tuple[Tensor, float]:
    """Radians a token f64 [head_dim / 2], and what cosines and sines are multiplied by.

    `max_context` is the model's, `served` the longest that this engine will see. Raises UserError on a scaling that is
    unknown or that lacks a setting.
    """
    half = head_dim // 2
    plain = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if scaling is None:
        return plain, 1.0
    kind = scaling.get("rope_type")
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise UserError(f"RoPE scaling {kind!r} is not supported; use a model with a supported one ({known})")
    settings = Fields({"max_context": max_context, "served": served, "theta": theta} | dict(scaling))
    frequencies, gain = _KINDS[kind](plain, settings)
    if not (torch.isfinite(frequencies).all() and (frequencies > 0).all() and math.isfinite(gain) and gain > 0):
        raise UserError(f"the model's RoPE scaling {kind!r} has impossible settings; fetch the model again")
    return frequencies, gain


def _linear(plain: Tensor, f: Fields) -> tuple[Tensor, float]:
    return plain / _factor(f), 1.0


def _llama3(plain: Tensor, f: Fields) -> tuple[Tensor, float]:
    """Short waves stay, long ones are stretched, those between are mixed."""
    low, high = f.real("low_freq_factor"), f.real("high_freq_factor")
    if high <= low:
        raise UserError("the model's high_freq_factor is not above its low_freq_factor; fetch the model again")
    turns = plain * _original(f) / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / _factor(f), 1.0


def _yarn(plain: Tensor, f: Fields) -> tuple[Tensor, float]:
    """Pairs that turn often in the original context stay, those that never turn are stretched, a ramp between."""
    half, original = len(plain), _original(f)
    factor = _factor(f) if f.has("factor") else f.integer("max_context") / original
    log_theta = math.log(f.real("theta"))
    if log_theta == 0:
        raise UserError("a RoPE base of 1 cannot be scaled by yarn; fetch the model again")
    ends = [
        half * math.log(original / (_positive(f, key, turns) * 2 * math.pi)) / log_theta
        for key, turns in (("beta_fast", 32.0), ("beta_slow", 1.0))
    ]
    if f.flag("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float64) - first) / (last - first if last != first else 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factor, _yarn_gain(factor, f)


def _yarn_gain(factor: float, f: Fields) -> float:
    """Attention grows a little colder with the stretch."""
    if f.has("attention_factor"):
        return f.real("attention_factor")
    grown = 0.1 * math.log(max(factor, 1.0))
    above, below = f.real("mscale", 0.0), f.real("mscale_all_dim", 0.0)
    return (grown * above + 1) / (grown * below + 1) if above and below else grown + 1


def _longrope(plain: Tensor, f: Fields) -> tuple[Tensor, float]:
    """A searched divisor for each pair; one list for the original context, another for what goes beyond it."""
    original = _original(f)
    divided = _divided(plain, f, "long_factor" if f.integer("served") > original else "short_factor")
    if f.has("attention_factor"):
        return divided, f.real("attention_factor")
    factor = _factor(f) if f.has("factor") else f.integer("max_context") / original
    return divided, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _factors(plain: Tensor, f: Fields) -> tuple[Tensor, float]:
    return _divided(plain, f, "factors"), 1.0


def _divided(plain: Tensor, f: Fields, key: str) -> Tensor:
    divisors = torch.tensor(f.reals(key), dtype=torch.float64)
    if divisors.shape != plain.shape:
        raise UserError(f"the model's {key} has {len(divisors)} numbers, {len(plain)} are needed; fetch it again")
    return plain / divisors


def _factor(f: Fields) -> float:
    return _positive(f, "factor", None)


def _original(f: Fields) -> int:
    original = f.integer(_ORIGINAL, f.integer("max_context"))
    if original < 2:
        raise UserError(f"the model's {_ORIGINAL} is {original}; fetch the model again")
    return original


def _positive(f: Fields, key: str, default: float | None) -> float:
    value = f.real(key, default)
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"the model's {key} is {value}, a positive number is needed; fetch the model again")
    return value


_KINDS: dict[str, Callable[[Tensor, Fields], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}


def stretched_context(context: int, scaling: Mapping[str, Any] | None) -> int:
    """Tokens that a model may read: yarn over a named original length promises `factor` times as many (Qwen 2.5)."""
    f = Fields(scaling or {})
    if scaling is None or scaling["rope_type"] != "yarn" or not (f.has(_ORIGINAL) and f.has("factor")):
        return context
    promised = f.integer(_ORIGINAL) * f.real("factor")
    return max(context, int(promised)) if math.isfinite(promised) else context
