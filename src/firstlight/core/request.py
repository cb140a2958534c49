"""A request: what somebody asked for, and what they get back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from firstlight.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens. Temperature 0 is greedy."""

    max_tokens: int = field(default=256, metadata={"doc": "tokens to generate at most"})
    temperature: float = field(default=0.0, metadata={"doc": "0 is greedy; higher is more random"})
    top_k: int = field(default=0, metadata={"doc": "sample from the k likeliest tokens only; 0 is all"})
    top_p: float = field(default=1.0, metadata={"doc": "sample from the likeliest tokens that hold this mass"})
    seed: int | None = field(default=None, metadata={"doc": "same seed, same output, whatever else runs"})
    ignore_eos: bool = field(default=False, metadata={"doc": "go on past the model's end token"})

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0.0 <= self.temperature <= 100.0,
            "top_k": self.top_k >= 0,
            "top_p": 0.0 < self.top_p <= 1.0,
        }
        for key, fine in checks.items():
            if not fine:
                raise UserError(f"{key}={getattr(self, key)} is out of range; {_RANGES[key]}")


_RANGES = {
    "max_tokens": "give 1 or more",
    "temperature": "give 0 (greedy) to 100",
    "top_k": "give 0 (all tokens) or more",
    "top_p": "give more than 0 and at most 1",
}

LogitsSink = Callable[["Tensor", "Tensor"], None]
"""(i64 [n] ordinals, f32 [n, vocabulary] logits), called block by block."""
Chooser = Callable[[Sequence[int], "Tensor"], int]
"""(ids generated so far, f32 [vocabulary] logits) -> the next id."""


@dataclass(slots=True)
class Request:
    """One prompt on its way through the engine."""

    rid: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    ttft_slo_s: float | None = None
    tenant: str = ""
    eos_ids: frozenset[int] = frozenset()
    logits_at: Sequence[int] | Literal["all"] | None = None
    """Prompt ordinals whose logits `logits_sink` wants; the last row is always computed."""
    logits_sink: LogitsSink | None = None
    choose: Chooser | None = None
    """Picks generated tokens in the place of sampling: a given text word for word, or another speaker's turn."""


@dataclass(slots=True)
class TokenOutput:
    """What one step gave one request."""

    rid: str
    new_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(slots=True)
class Completion:
    """A finished answer."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    report: dict[str, Any] = field(default_factory=dict)
    """The JSON that `firstlight run --json` prints."""
