"""Long texts with something hidden in them: what the retrieval tasks of `firstlight eval` let a model read.

A text grows with a count, and the longest one that fits into a prompt is taken. Running text comes from a book that
ships with Firstlight, so no two places of it are alike; what is hidden lies between sentences, at depths.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

from firstlight.evaluate.books import text_of

BOOK = "the-federalist-papers"
_LINE_WORDS = 25
_GOLDEN = 0.6180339887498949

T = TypeVar("T")


class Growing(Protocol):
    """A text of any length."""

    def text(self, count: int) -> str:
        """The text of `count` units, longer the more there are; all that is asked for is in it even at 0."""
        ...


@dataclass(frozen=True)
class Haystack:
    """Sentences round and round, each with the white space before it; facts between them, at shares of the letters."""

    sentences: Sequence[str]
    facts: Sequence[tuple[float, str]]

    def text(self, count: int) -> str:
        hay = [self.sentences[i % len(self.sentences)] for i in range(count)]
        ends = list(accumulate(map(len, hay), initial=0))
        for depth, fact in sorted(self.facts, reverse=True):
            hay.insert(bisect(ends, depth * ends[-1]) - 1, fact)
        return "".join(hay).strip()


def pages(dice: random.Random) -> list[str]:
    """The book's sentences from a drawn place on, round to it again."""
    sentences = re.findall(r"\s*\S.*?(?:[.!?][”’)]*(?=\s)|\Z)", text_of(BOOK), re.DOTALL)
    start = dice.randrange(len(sentences))
    return sentences[start:] + sentences[:start]


def line(dice: random.Random) -> list[str]:
    """One line of the book, some sentences long: RULER's repeated noise."""
    found = ""
    for sentence in pages(dice):
        found = f"{found} {' '.join(sentence.split())}".strip()
        if len(found.split()) >= _LINE_WORDS:
            break
    return [f"\n{found}"]


@dataclass(frozen=True)
class Draw:
    """Sample number `index` for prompts of `length` tokens, and the dice that only it throws."""

    dice: random.Random
    index: int
    length: int

    def depth(self) -> float:
        """Where it hides what it asks for: after a few samples depths are spread over the whole text."""
        return (self.index * _GOLDEN + 0.5 * self.dice.random() / 8) % 1


def spread(depth: float, parts: int) -> list[float]:
    """Depths of several facts at even distances, the first at `depth`."""
    return [(depth + i / parts) % 1 for i in range(parts)]


def longest(made: Callable[[int], T], size: Callable[[T], int], limit: int) -> T | None:
    """The largest of made(0), made(1), ... whose size is at most `limit`; None if there is none."""
    if size(found := made(0)) > limit:
        return None
    step, count = 1, 0
    while size(larger := made(count + step)) <= limit:
        found, count, step = larger, count + step, step * 2
    while step := step // 2:
        if size(larger := made(count + step)) <= limit:
            found, count = larger, count + step
    return found
