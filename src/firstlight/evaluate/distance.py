"""How far two distributions of the next token are apart: the formulas of agreement and perplexity.

A row of the reference is kept as an outline: its likeliest tokens one by one, all others as one. Lumping can only lower
a divergence: on SmolLM2-135M by 3 %, of bf16's as of a narrow band's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIKELIEST = 2048
"""Tokens that an outline names."""


@dataclass(frozen=True)
class Outline:
    """Distributions of n rows: the k likeliest tokens `ids` i32 [n, k], likeliest first, and their `logp` f32 [n, k].

    `rest` f32 [n] is the log of all other tokens' mass; -inf where there are none.
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor

    def __getitem__(self, rows: Tensor) -> Outline:
        return Outline(self.ids[rows], self.logp[rows], self.rest[rows])


def outline(logits: Tensor) -> Outline:
    """The outline of logits f32 [n, vocabulary]."""
    ids = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1).indices
    return _outline_at(logits, ids)


def divergence(reference: Outline, logits: Tensor) -> Tensor:
    """KL(reference || softmax of logits f32 [n, vocabulary]) in nats, f64 [n]."""
    other = _outline_at(logits, reference.ids.long())
    named = reference.logp.double().exp() * (reference.logp.double() - other.logp.double())
    rest = reference.rest.double().exp() * (reference.rest.double() - other.rest.double())
    return named.sum(-1) + torch.where(reference.rest.isneginf(), 0.0, rest)


def same_top(reference: Outline, logits: Tensor) -> Tensor:
    """Whether the likeliest token is the reference's, bool [n]."""
    return logits.argmax(-1) == reference.ids[:, 0]


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the labels i64 [n] under logits f32 [n, vocabulary], in nats, f64 [n]."""
    return logits.double().logsumexp(-1) - logits.double().gather(-1, labels[:, None])[:, 0]


def _outline_at(logits: Tensor, ids: Tensor) -> Outline:
    exact = logits.double()
    total = exact.logsumexp(-1, keepdim=True)
    rest = exact.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return Outline(ids.int(), (exact.gather(-1, ids) - total).float(), (rest - total[:, 0]).float())
