"""Sampling: logits of many requests to one token each, all rows at once.

Randomness is one uniform number per (seed, ordinal), so a request's tokens don't depend on its company, on preemption
or on the schedule.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from firstlight.core.request import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], dice: Sequence[float]) -> list[int]:
    """logits f32 [n, vocabulary], one set of params and one uniform number in [0, 1) a row -> n token ids."""
    picked = logits.argmax(-1)
    hot = [i for i, p in enumerate(params) if p.temperature > 0]
    if hot:
        thrown = torch.tensor([dice[i] for i in hot], dtype=torch.float64)  # in float32 the highest would be 1
        picked[hot] = _draw(logits[hot], [params[i] for i in hot], thrown)
    return [int(token) for token in picked]


def die(seed: int | str, ordinal: int) -> float:
    """The uniform number of one token."""
    return random.Random(f"{seed}:{ordinal}").random()


def _draw(logits: Tensor, params: Sequence[SamplingParams], dice: Tensor) -> Tensor:
    """Inverse of the cumulative distribution over tokens from likeliest to least likely."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    below_best = (ranked - ranked[:, :1]).double()  # so that the likeliest token is 0 at any temperature
    probability = (below_best / torch.tensor([p.temperature for p in params], dtype=torch.float64)[:, None]).softmax(-1)
    before = probability.cumsum(-1) - probability
    top_k = torch.tensor([p.top_k or logits.shape[1] for p in params])
    allowed = torch.arange(logits.shape[1]) < top_k[:, None]
    allowed &= before < torch.tensor([p.top_p for p in params], dtype=torch.float64)[:, None]
    probability = probability.masked_fill(~allowed, 0)
    mass = probability.cumsum(-1)
    place = (mass <= (dice[:, None] * mass[:, -1:])).sum(-1, keepdim=True)
    return order.gather(1, place.minimum(allowed.sum(-1, keepdim=True) - 1))[:, 0]
