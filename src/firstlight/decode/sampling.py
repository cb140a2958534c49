"""Sampling: logits of many requests to one token each, all rows at once.

Randomness is one uniform number per (seed, ordinal), so a request's tokens don't depend on its company, on preemption
or on the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from firstlight.core.request import SamplingParams
from firstlight.decode.logprobs import logprobs_of
from firstlight.decode.state import Decoding
from firstlight.decode.structured import constrain

_FEW = 256
"""Tokens that are ranked first: nearly every draw is decided among them, and a full sort takes ten times as long."""


def sample(logits: Tensor, states: Sequence[Decoding]) -> list[int]:
    """logits f32 [n, vocabulary], which are overwritten, and each row's request -> n token ids.

    Log-probabilities go to the states that want them; the caller gives each state its token.
    """
    if all(state.is_greedy for state in states):
        return best(logits)
    asking = [i for i, state in enumerate(states) if state.params.logprobs is not None]
    raw = logits[asking] if asking else logits
    edit(logits, states)
    dice = [state.die() if state.params.temperature > 0 else 0.0 for state in states]
    tokens = pick(logits, [state.params for state in states], dice)
    wanted = [states[i].params.logprobs or 0 for i in asking]
    for i, entry in zip(asking, logprobs_of(raw, [tokens[i] for i in asking], wanted)):
        states[i].logprobs.append(entry)
    return tokens


def best(logits: Tensor) -> list[int]:
    """logits f32 [n, vocabulary] -> the likeliest token of each row, the first of equal ones."""
    tokens: list[int] = logits.numpy().argmax(-1).tolist()  # a quarter of what torch's takes after a decode step
    return tokens


def edit(logits: Tensor, states: Sequence[Decoding]) -> None:
    """Grammar, biases and penalties, in place. Rows without them keep their bits."""
    constrain(logits, [state.structure for state in states])
    _add(logits, [state.biases() for state in states])
    _repeat(logits, states)
    _add(logits, [state.penalties() for state in states])


def _add(logits: Tensor, changes: Sequence[Mapping[int, float]]) -> None:
    """Each row's changes, token -> what is added."""
    rows = [row for row, change in enumerate(changes) for _ in change]
    if rows:
        ids = [token for change in changes for token in change]
        logits[rows, ids] += torch.tensor([value for change in changes for value in change.values()])


def _repeat(logits: Tensor, states: Sequence[Decoding]) -> None:
    """The repetition penalty of CTRL (arXiv 1909.05858): logits are divided by it, negative ones multiplied."""
    penalised = [(row, state) for row, state in enumerate(states) if state.params.repetition_penalty != 1]
    if penalised:
        rows = torch.cat([torch.full_like(state.seen, row) for row, state in penalised])
        ids = torch.cat([state.seen for _, state in penalised])
        penalty = torch.tensor([state.params.repetition_penalty for state in states])[rows]
        x = logits[rows, ids]
        logits[rows, ids] = torch.where(x > 0, x / penalty, x * penalty)


def pick(logits: Tensor, params: Sequence[SamplingParams], dice: Sequence[float]) -> list[int]:
    """logits f32 [n, vocabulary], one set of params and one uniform number in [0, 1) a row -> n token ids."""
    tokens = best(logits)
    hot = [i for i, p in enumerate(params) if p.temperature > 0]
    if hot:
        thrown = torch.tensor([dice[i] for i in hot], dtype=torch.float64)  # in float32 the highest would be 1
        for i, token in zip(hot, _draw(logits[hot], [params[i] for i in hot], thrown).tolist()):
            tokens[i] = token
    return tokens


def _draw(logits: Tensor, params: Sequence[SamplingParams], dice: Tensor) -> Tensor:
    """Inverse of the cumulative distribution over tokens from likeliest to least likely; equal ones by id."""
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64)[:, None]
    below_best = logits.double() - logits.max(-1, keepdim=True).values  # the likeliest is 0 at any temperature
    probability = (below_best / temperature).softmax(-1)
    width = logits.shape[1]
    picked, sure = _among(min(_FEW, width), logits, probability, params, dice)
    if not bool(sure.all()):
        left = (~sure).nonzero()[:, 0]
        some = [params[i] for i in left.tolist()]
        picked[left] = _among(width, logits[left], probability[left], some, dice[left])[0]
    return picked


def _among(
    width: int, logits: Tensor, probability: Tensor, params: Sequence[SamplingParams], dice: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws that look at the `width` likeliest tokens only: i64 [n] ids, bool [n] whether all others can't matter."""
    order, known = _ranked(logits, width)
    p = probability.gather(1, order)
    upto = p.cumsum(-1)
    before = torch.nn.functional.pad(upto[:, :-1], (1, 0))
    top_k = torch.tensor([p.top_k if p.top_k > 0 else logits.shape[1] for p in params])[:, None]
    top_p, min_p = torch.tensor([[p.top_p, p.min_p] for p in params], dtype=torch.float64).T[:, :, None]
    cut = (top_k < logits.shape[1]) | (min_p > 0)
    kept = (torch.arange(width) < top_k) & (p >= min_p * p[:, :1]) & (p > 0)
    sure = ~cut | _ends_within(kept, known)
    mass = torch.where(cut, _mass(upto, kept), 1)
    nucleus = top_p < 1
    kept &= ~nucleus | (before < top_p * mass)
    sure &= ~nucleus | _ends_within(kept, known)
    mass = torch.where(cut | nucleus, _mass(upto, kept), 1)
    place = (upto <= dice[:, None] * mass).sum(-1, keepdim=True).minimum(kept.sum(-1, keepdim=True) - 1)
    sure &= place < known
    return order.gather(1, place)[:, 0], sure[:, 0]


def _ranked(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ids of the likeliest tokens [n, width], equal ones by id; how many ranks of a row are right [n, 1].

    Where more tokens are as likely as the last one, `topk` says nothing of which of them it gives.
    """
    if width == logits.shape[1]:
        return logits.sort(dim=-1, descending=True, stable=True).indices, torch.full((len(logits), 1), width)
    ids = logits.topk(width).indices.sort(-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), (values > values[:, -1:]).sum(-1, keepdim=True)


def _ends_within(kept: Tensor, known: Tensor) -> Tensor:
    """Whether what is kept, always a beginning, ends before the ranks that are not known."""
    return kept.sum(-1, keepdim=True) <= known


def _mass(upto: Tensor, kept: Tensor) -> Tensor:
    return upto.gather(1, kept.sum(-1, keepdim=True) - 1)
