"""A request: what somebody asked for, and what they get back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Protocol

from firstlight.core.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_LOGPROBS = 20
"""Tokens a place whose probabilities can be asked for."""
_MAX_BIAS = 100.0


def _opt(default: Any, doc: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"doc": doc, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens, and when to stop. Temperature 0 is greedy; names and meanings are vLLM's and OpenAI's.

    The order: grammar, `logit_bias` and `min_tokens`, repetition, frequency and presence penalties, temperature,
    `min_p`, `top_k`, `top_p`. Each filter renormalises what the ones before it left. Raises UserError on values that
    can't be.
    """

    max_tokens: int = _opt(256, "tokens to generate at most")
    min_tokens: int = _opt(0, "before so many tokens nothing ends the answer")
    temperature: float = _opt(0.0, "0 is greedy; higher is more random")
    top_k: int = _opt(0, "sample from the k likeliest tokens only; 0 is all")
    top_p: float = _opt(1.0, "sample from the likeliest tokens that hold this mass")
    min_p: float = _opt(0.0, "leave out tokens less likely than this share of the likeliest one")
    repetition_penalty: float = _opt(1.0, "above 1 makes tokens of the prompt and the answer less likely")
    presence_penalty: float = _opt(0.0, "taken from the logit of each token that the answer has")
    frequency_penalty: float = _opt(0.0, "taken from the logit of a token, times how often the answer has it")
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        hash=False,
        metadata={"doc": "add to a token's logit, -100 to 100 (repeatable)", "metavar": "TOKEN=BIAS"},
    )
    seed: int | None = _opt(None, "same seed, same output, whatever else runs")
    n: int = _opt(1, "answers to one prompt; with a seed, answer i draws with seed + i")
    stop: Sequence[str] = _opt((), "end before this text, which is left out (repeatable)", "TEXT")
    stop_token_ids: Sequence[int] = _opt((), "end at this token too, not only at the model's own (repeatable)", "TOKEN")
    ignore_eos: bool = _opt(False, "go on past the model's end token")
    logprobs: int | None = _opt(None, "give each token's log-probability, and those of so many likeliest ones")
    prompt_logprobs: int | None = _opt(None, "the same for the prompt's tokens")
    json_schema: str | Mapping[str, Any] | None = _opt(None, "the answer is JSON of this schema", "SCHEMA")
    regex: str | None = _opt(None, "the answer matches this regular expression", "REGEX")
    grammar: str | None = _opt(None, "the answer is a `root` of this grammar, written in EBNF as for llama.cpp", "EBNF")

    def __post_init__(self) -> None:
        for key, value in _normal(self).items():
            object.__setattr__(self, key, value)
        for key, (kind, fine, cure) in _RANGES.items():
            value = getattr(self, key)
            if value is not None and not (isinstance(value, kind) and fine(value)):
                raise UserError(f"{key}={value!r} is out of range; {cure}")
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; change one of them"
            )
        self._check_structure()

    def _check_structure(self) -> None:
        given = [key for key in ("json_schema", "regex", "grammar") if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both say what the answer is; leave one out")
        for key in given:
            if not isinstance(getattr(self, key), str) or not getattr(self, key).strip():
                raise UserError(f"{key} is empty or no text; give one, or leave it out")
        for key in ("ignore_eos", "min_tokens") if given else ():
            if getattr(self, key):
                raise UserError(f"{key} and {given[0]} both decide where the answer ends; leave one out")


def _normal(params: SamplingParams) -> dict[str, Any]:
    """Collections in one form each, whatever form they came in."""
    schema = params.json_schema
    try:
        made = {"json_schema": json.dumps(schema) if isinstance(schema, Mapping) else schema}
    except (TypeError, ValueError, RecursionError):
        raise UserError("json_schema holds what JSON can't say; give a schema of plain values") from None
    return made | {
        "stop": _stops(params.stop),
        "stop_token_ids": _token_ids(params.stop_token_ids),
        "logit_bias": _biases(params.logit_bias),
    }


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else _listed("stop", given)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError("stop holds an empty text, which is everywhere; leave it out")
    return tuple(stops)


def _listed(key: str, given: Any) -> list[Any]:
    try:
        return list(given if given is not None else ())
    except TypeError:
        raise UserError(f"{key}={given!r} is no list; give a list") from None


def _token_ids(given: Any) -> tuple[int, ...]:
    ids = _listed("stop_token_ids", given)
    if not all(isinstance(token, Integral) and int(token) >= 0 for token in ids):
        raise UserError(f"stop_token_ids={ids!r} are no token ids; give whole numbers from 0 on")
    return tuple(int(token) for token in ids)


def _biases(given: Any) -> dict[int, float]:
    """A mapping as OpenAI's API has it (its keys are texts there), or texts like `17=-2.5`."""
    texts = () if isinstance(given, Mapping) else _listed("logit_bias", given)
    pairs = given.items() if isinstance(given, Mapping) else [str(text).split("=", 1) for text in texts]
    try:
        made = {int(token): float(bias) for token, bias in pairs}
    except (TypeError, ValueError):
        raise UserError("can't read logit_bias; write it like 17=-2.5, a token id and a number") from None
    for token, bias in made.items():
        if token < 0 or not abs(bias) <= _MAX_BIAS:
            raise UserError(f"logit_bias {token}={bias:g} is out of range; give token ids and -100 to 100")
    return made


_RANGES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_tokens": (Integral, lambda v: v >= 1, "give 1 or more"),
    "min_tokens": (Integral, lambda v: v >= 0, "give 0 or more"),
    "temperature": (Real, lambda v: 0 <= v <= 100, "give 0 (greedy) to 100"),
    "top_k": (Integral, lambda v: v >= -1, "give 0 (all tokens) or more"),
    "top_p": (Real, lambda v: 0 < v <= 1, "give more than 0 and at most 1"),
    "min_p": (Real, lambda v: 0 <= v <= 1, "give 0 to 1"),
    "repetition_penalty": (Real, lambda v: 0 < v < math.inf, "give more than 0; 1 is none"),
    "presence_penalty": (Real, lambda v: -2 <= v <= 2, "give -2 to 2"),
    "frequency_penalty": (Real, lambda v: -2 <= v <= 2, "give -2 to 2"),
    "seed": (Integral, lambda v: True, "give a whole number"),
    "n": (Integral, lambda v: 1 <= v <= 128, "give 1 to 128"),
    "logprobs": (Integral, lambda v: 0 <= v <= MAX_LOGPROBS, f"give 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (Integral, lambda v: 0 <= v <= MAX_LOGPROBS, f"give 0 to {MAX_LOGPROBS}"),
}

LogitsSink = Callable[["Tensor", "Tensor"], None]
"""(i64 [n] ordinals, f32 [n, vocabulary] logits), called block by block."""
Chooser = Callable[[Sequence[int], "Tensor"], int]
"""(ids generated so far, f32 [vocabulary] logits) -> the next id."""


class TextStream(Protocol):
    """Token ids to text as they come."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now, maybe empty."""

    def flush(self) -> str:
        """What was still uncertain at the end."""


class Structure(Protocol):
    """What one answer may still become under its grammar."""

    def fill(self, mask: Tensor, row: int) -> None:
        """Sets the bits of the tokens that may come next in a row of i32 [rows, ceil(vocabulary / 32)]."""

    def accept(self, token: int) -> None:
        """The next token, one of those that were allowed."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Known:
    """Cells that an engine holds: the K/V of a document's `num_tokens` tokens.

    `table`: their blocks, i32 [L, Hkv, columns]; 0 where a layer keeps none.
    """

    number: int
    table: NDArray[Any]
    num_tokens: int


@dataclass(slots=True)
class Request:
    """One prompt on its way through the engine, to one answer. `priority`: a smaller number is served first."""

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
    recompute_cached: bool = False
    """Compute all prompt rows, those too whose cells are cached: their logits are not."""
    text: TextStream | None = None
    """Makes the text of the outputs. Stop strings need it."""
    structure: Structure | None = None
    after: str | None = None
    """A request of the same prompt. Where prefixes are cached this one waits until that one is prefilled or gone."""
    choose: Chooser | None = None
    """Picks generated tokens in the place of sampling: a given text word for word, or another speaker's turn."""

    known: Known | None = None
    """Cells of the prompt's beginning; at least one token comes after them."""
    keep: Callable[[Known | None], None] | None = None
    """Gets the prompt's own cells, to keep them; None without room for that. For requests of one token, which write no
    cell after the prompt."""

    def __post_init__(self) -> None:
        slo = self.ttft_slo_s
        if type(self.priority) is not int or abs(self.priority) > MOST_PRIORITY:
            raise UserError(
                f"priority={self.priority!r} is out of range; give a whole number, ±{MOST_PRIORITY} at most"
            )
        if slo is not None and not (isinstance(slo, int | float) and 0 < slo < float("inf")):
            raise UserError(f"ttft_slo_s={slo!r} is no length of time; give seconds, more than 0")


MOST_PRIORITY = 1_000_000


@dataclass(slots=True)
class Logprob:
    """One token's place in the model's own distribution, before penalties, filters and temperature."""

    logprob: float
    rank: int
    """1 = the likeliest."""
    decoded_token: str = ""


Logprobs = dict[int, Logprob]
"""Of one place: the token that stands there, then the likeliest ones that were asked for, by rank."""


@dataclass(slots=True)
class TokenOutput:
    """What one step gave one request."""

    rid: str
    new_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    text: str = ""
    """What is certain of the answer's text now: no half character, nothing that may become a stop string."""
    logprobs: list[Logprobs] | None = None


@dataclass(slots=True)
class Completion:
    """A finished answer."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    report: dict[str, Any] = field(default_factory=dict)
    """The JSON that `firstlight run --json` prints."""
    index: int = 0
    """Which of the prompt's `n` answers."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for the model's own end tokens."""
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    """None where nothing was computed: for the first token, and behind rows that a method left out."""
