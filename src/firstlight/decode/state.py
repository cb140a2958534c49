"""What sampling remembers of one request from token to token. The engine holds it; recompute leaves it alone.

Nothing here depends on K/V, on the schedule or on other requests: it is a function of the request and its tokens.
"""

from __future__ import annotations

import random
from collections import Counter

import torch

from firstlight.core.request import FinishReason, Logprobs, Request, SamplingParams, TokenOutput
from firstlight.decode.stops import StopText

_NOTHING = torch.tensor([], dtype=torch.int64)


class Decoding:
    """One answer under way: `take` each token, then `output` says what its reader gets."""

    def __init__(self, request: Request, seed: int) -> None:
        """`seed` is for requests that bring none; each of those draws its own numbers."""
        self.request, self.params = request, request.sampling
        self.structure = request.structure
        self.ends = frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else request.eos_ids)
        self.token_ids: list[int] = []
        self.counts: Counter[int] = Counter()
        """How often the answer has a token; kept where a penalty asks for it."""
        repeats = self.params.repetition_penalty != 1
        self.seen = torch.tensor(sorted(set(request.prompt_ids)), dtype=torch.int64) if repeats else _NOTHING
        """i64, the tokens of prompt and answer; kept where the repetition penalty asks for them."""
        self.stop_reason: int | str | None = None
        self.logprobs: list[Logprobs] = []
        self.is_greedy = self.structure is None and _always_likeliest(self.params)
        """Whether each token is the likeliest one, and nobody asks how likely."""
        self._seed = f"{seed}:{request.rid}" if self.params.seed is None else str(self.params.seed)
        self._stops = StopText(self.params.stop)
        self._text = ""
        self._told = 0

    def die(self) -> float:
        """The next token's uniform number in [0, 1): one for each (seed, ordinal)."""
        return die(self._seed, len(self.request.prompt_ids) + len(self.token_ids))

    def biases(self) -> dict[int, float]:
        """What is added to logits whatever came before: `logit_bias`, and no end before `min_tokens`."""
        early = len(self.token_ids) < self.params.min_tokens
        return {**self.params.logit_bias, **(dict.fromkeys(self.ends, -torch.inf) if early else {})}

    def penalties(self) -> dict[int, float]:
        """What is added to the logits of tokens that the answer has."""
        often, once = self.params.frequency_penalty, self.params.presence_penalty
        return {token: -(often * count + once) for token, count in self.counts.items()}

    def take(self, token: int) -> FinishReason | None:
        """The token that was picked; says whether it ends the answer."""
        self.token_ids.append(token)
        self._count(token)
        may_stop = len(self.token_ids) >= self.params.min_tokens
        if token in self.ends and may_stop:
            self.stop_reason = token if token in self.params.stop_token_ids else None
            return "stop"
        if self.structure is not None:
            self.structure.accept(token)
        if self.request.text is not None:
            self._text += self._stops.push(self.request.text.push([token]), may_stop)
        is_last = len(self.token_ids) >= self.params.max_tokens
        if is_last:
            self._flush()
        if self._stops.matched is not None:
            self.stop_reason = self._stops.matched
            return "stop"
        return "length" if is_last else None

    def output(self, reason: FinishReason | None) -> TokenOutput:
        """What is new since the last output; with a reason, all that is left."""
        if reason is not None:
            self._flush()
        ids, logprobs = self.token_ids[self._told :], self.logprobs[self._told :]
        text, self._text, self._told = self._text, "", len(self.token_ids)
        wanted = None if self.params.logprobs is None else logprobs
        return TokenOutput(self.request.rid, ids, reason, text=text, logprobs=wanted)

    def _flush(self) -> None:
        """The answer is over: what was uncertain is text, up to a stop that it completes."""
        if self.request.text is not None and self._stops.matched is None:
            self._text += self._stops.push(self.request.text.flush()) + self._stops.flush()

    def _count(self, token: int) -> None:
        params = self.params
        if params.frequency_penalty or params.presence_penalty:
            self.counts[token] += 1
        if params.repetition_penalty != 1 and not (self.seen == token).any():
            self.seen = torch.cat([self.seen, torch.tensor([token])])


def _always_likeliest(p: SamplingParams) -> bool:
    penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
    plain = p.logprobs is None and not p.logit_bias and p.min_tokens == 0
    return plain and p.temperature == 0 and penalties == (1, 0, 0)


def die(seed: int | str, ordinal: int) -> float:
    """The uniform number of one token."""
    return random.Random(f"{seed}:{ordinal}").random()
