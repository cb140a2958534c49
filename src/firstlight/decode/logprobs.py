"""Log-probabilities of tokens as they were picked, and of prompts as their rows pass.

They are the model's own: before grammar, penalties, temperature and filters. Beside the path from logits to a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from firstlight.core.request import MAX_LOGPROBS, Logprob, Logprobs, Request

_ROWS = 32
"""Rows of a prompt whose log-probabilities are made at a time, so that no [T, vocabulary] tensor ever is."""


def logprobs_of(logits: Tensor, tokens: Sequence[int], wanted: Sequence[int]) -> list[Logprobs]:
    """logits f32 [n, vocabulary], the token that stands behind each row, how many of the likeliest to name."""
    if not tokens:
        return []
    logprobs = logits.log_softmax(-1)
    here = logprobs.gather(1, logits.new_tensor(tokens).long()[:, None])
    ranks = ((logprobs > here).sum(-1) + 1).tolist()
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logits.shape[1]))  # one width, whatever is wanted: ties stay put
    rows = zip(tokens, here[:, 0].tolist(), ranks, values.tolist(), ids.tolist(), wanted)
    return [_entry(*row) for row in rows]


def _entry(token: int, logprob: float, rank: int, values: list[float], ids: list[int], wanted: int) -> Logprobs:
    likeliest = {i: Logprob(value, place + 1) for place, (i, value) in enumerate(zip(ids[:wanted], values))}
    return {token: Logprob(logprob, rank)} | {i: entry for i, entry in likeliest.items() if i != token}


def watch_prompt(request: Request) -> list[Logprobs | None] | None:
    """Has a request's prompt rows fill the list, one entry a prompt token; None if its params don't ask for that."""
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return None
    sink = PromptLogprobs(request.prompt_ids, wanted)
    request.logits_at, request.logits_sink, request.recompute_cached = "all", sink, True
    return sink.entries


class PromptLogprobs:
    """The sink of a request that wants its prompt's log-probabilities. A row that passes again changes nothing."""

    def __init__(self, prompt_ids: Sequence[int], wanted: int) -> None:
        self._ids, self._wanted = list(prompt_ids), wanted
        self.entries: list[Logprobs | None] = [None] * len(self._ids)

    def __call__(self, tok: Tensor, logits: Tensor) -> None:
        """The row of ordinal t speaks of the token t + 1; the last row's is no prompt token."""
        places = [t + 1 for t in tok.tolist() if t + 1 < len(self._ids)]
        for first in range(0, len(places), _ROWS):
            some = places[first : first + _ROWS]
            tokens = [self._ids[t] for t in some]
            made = logprobs_of(logits[first : first + len(some)], tokens, [self._wanted] * len(some))
            for place, entry in zip(some, made):
                self.entries[place] = entry
