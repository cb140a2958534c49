"""Reading a book under a setting, row by row beside float32: what agreement and perplexity are made of.

A prompt is an excerpt of a book. Rows are looked at in 16 windows of 64, spread evenly over the prompt, and then one by
one over the next 128 tokens, which are given, not sampled (teacher forcing): those rows read what the prompt's prefill
left in the cache, so they see the damage done to K and V.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.engine.engine import Engine
from firstlight.evaluate.asking import Asked, ask, likeliest
from firstlight.evaluate.books import BOOKS, text_of
from firstlight.evaluate.distance import Outline, divergence, outline, same_top, surprise
from firstlight.prompt.tokenizer import Tokenizer

WINDOWS, WINDOW = 16, 64
CONTINUATION, RUN = 128, 16
"""Tokens that are given after the prompt, and how many of them are one cluster."""
TRUNCATED = 1024
"""Tokens of context that a truncated reader has."""

SUMS = ("rows", "kl", "top1", "nll", "nll_reference", "nll_truncated")
"""What a record holds of each window, summed over its rows; `nll_truncated` is None where nothing was cut off."""

Look = Callable[[Tensor, Tensor], None]
"""(i64 [n] ordinals, f32 [n, vocabulary] logits)."""


@dataclass(frozen=True)
class Excerpt:
    """`length` tokens of a prompt, the tokens of its continuation, and one more, which is only predicted."""

    book: str
    ids: list[int]
    length: int
    num_bos: int

    @property
    def num_tokens(self) -> int:
        """Tokens of context that it takes."""
        return self.length + CONTINUATION + 1

    @property
    def rows(self) -> Tensor:
        """i64 [n]: the ordinals that are looked at, ascending."""
        return torch.cat([torch.arange(w.start, w.stop) for w in (*self.windows, *self.runs)])

    @property
    def windows(self) -> list[range]:
        """Disjoint windows of the prompt, the first at its beginning and the last at its end."""
        count = min(WINDOWS, self.length // WINDOW)
        starts = [i * (self.length - WINDOW) // max(count - 1, 1) for i in range(count)]
        return [range(start, start + WINDOW) for start in starts]

    @property
    def runs(self) -> list[range]:
        """The continuation in clusters."""
        return [range(self.length + i, self.length + i + RUN) for i in range(0, CONTINUATION, RUN)]

    def labels(self, tok: Tensor) -> Tensor:
        """i64 [n]: what comes after each of the ordinals."""
        return torch.tensor(self.ids)[tok + 1]


@dataclass(frozen=True)
class Reference:
    """What float32 says of an excerpt's rows, in their order: distributions, and -log p of the true next token.

    `nll` f64 [n]; `nll_truncated` f64 [n] has the last TRUNCATED tokens for context, NaN where there are no more.
    """

    outline: Outline
    nll: Tensor
    nll_truncated: Tensor


def excerpt(tokenizer: Tokenizer, length: int, index: int) -> Excerpt:
    """Excerpt number `index`: the books in turn, then their next pages. Raises UserError where they end."""
    if length < WINDOW:
        raise UserError(f"{length} tokens are too few to read; give --lengths {WINDOW} or more")
    book, bos = BOOKS[index % len(BOOKS)], tokenizer.bos_ids
    ids, need = _book_ids(tokenizer, book), length - len(bos) + CONTINUATION + 1
    start = index // len(BOOKS) * need
    if start + need > len(ids):
        most = len(BOOKS) * (len(ids) // need)
        raise UserError(f"the books hold {most} excerpts of {length} tokens; give fewer --samples or less --lengths")
    return Excerpt(book, [*bos, *ids[start : start + need]], length, len(bos))


@functools.lru_cache(len(BOOKS))
def _book_ids(tokenizer: Tokenizer, book: str) -> list[int]:
    return tokenizer.encode(text_of(book))


def compare(engine: Engine, what: Excerpt, reference: Reference, probe_rows: int) -> dict[str, Any]:
    """The record of an engine's reading: sums for each window.

    The prompt's last `probe_rows` rows, which a method treats unlike the others, are summed apart.
    """
    table = _Table(what, reference)
    asked = read(engine, what, table.look)
    plain = table.tok < what.length - probe_rows
    return {
        "book": what.book,
        **asked.facts(),
        "prompt": table.sums(what.windows, plain),
        "probe_rows": table.sums(what.windows, ~plain) if probe_rows else [],
        "continuation": table.sums(what.runs, table.tok >= what.length),
    }


def refer(engine: Engine, what: Excerpt) -> Reference:
    """The reference, read by an engine that is dense and float32."""
    outlines: list[Outline] = []
    nll: list[Tensor] = []

    def look(tok: Tensor, logits: Tensor) -> None:
        outlines.append(outline(logits))
        nll.append(surprise(logits, what.labels(tok)))

    read(engine, what, look)
    parts = zip(*((o.ids, o.logp, o.rest) for o in outlines))
    spans = (*what.windows, range(what.length, what.length + CONTINUATION))
    cut = [_truncated(engine, what, span) for span in spans]
    return Reference(Outline(*(torch.cat(part) for part in parts)), torch.cat(nll), torch.cat(cut))


def read(engine: Engine, what: Excerpt, look: Look) -> Asked:
    """Prefill the excerpt, then force its continuation. `look` gets every row that reaches the head, in order."""

    def choose(generated: Sequence[int], logits: Tensor) -> int:
        at = what.length + len(generated)
        if generated:
            look(torch.tensor([at - 1]), logits[None])
        return what.ids[at]

    wanted = what.rows[what.rows < what.length].tolist()
    return ask(engine, PromptIds(what.ids[: what.length]), choose, CONTINUATION + 1, wanted, look)


def _truncated(engine: Engine, what: Excerpt, span: range) -> Tensor:
    """-log p of a span's labels with little context, f64 [n]; NaN where that is all there is."""
    if span.stop <= TRUNCATED:
        return torch.full((len(span),), torch.nan, dtype=torch.float64)
    found: list[Tensor] = []
    ids = [*what.ids[: what.num_bos], *what.ids[span.stop - TRUNCATED : span.stop]]
    first = len(ids) - len(span)

    def look(tok: Tensor, logits: Tensor) -> None:
        found.append(surprise(logits, what.labels(tok + span.start - first)))

    ask(engine, PromptIds(ids), likeliest, 1, range(first, len(ids)), look)
    return torch.cat(found)


class _Table:
    """A figure for each row of an excerpt, NaN for rows that no logits came of (a method left them out)."""

    def __init__(self, what: Excerpt, reference: Reference) -> None:
        self.what, self.reference, self.tok = what, reference, what.rows
        self.kl, self.top1, self.nll = (torch.full((len(self.tok),), torch.nan, dtype=torch.float64) for _ in range(3))

    def look(self, tok: Tensor, logits: Tensor) -> None:
        at = torch.searchsorted(self.tok, tok)
        expected = self.reference.outline[at]
        self.kl[at] = divergence(expected, logits)
        self.top1[at] = same_top(expected, logits).double()
        self.nll[at] = surprise(logits, self.what.labels(tok))

    def sums(self, windows: list[range], among: Tensor) -> list[dict[str, Any]]:
        return [self._sum(window, among) for window in windows]

    def _sum(self, window: range, among: Tensor) -> dict[str, Any]:
        inside = (self.tok >= window.start) & (self.tok < window.stop) & among & ~self.nll.isnan()
        columns = (self.kl, self.top1, self.nll, self.reference.nll, self.reference.nll_truncated)
        values = [int(inside.sum()), *(float(column[inside].sum()) for column in columns)]
        cut = window.stop > TRUNCATED
        return {"first": window.start, **dict(zip(SUMS, values)), **({} if cut else {"nll_truncated": None})}
