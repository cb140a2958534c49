"""Counting words: RULER's `cwe` and `fwe` (arXiv 2404.06654, section 3.3). The whole text has to be read.

- `cwe`, common words: a numbered list in which ten words stand thirty times each and all others three times (in prompts
  under 4,096 tokens, which have no room for that, ten times and once). The words are a book's.
- `fwe`, frequent words: made-up words whose counts follow a zeta distribution with exponent 2, much as those of a
  language do; the likeliest is noise, the next three are asked for.
"""

from __future__ import annotations

import functools
import random
import re
import string
from dataclasses import dataclass

from firstlight.evaluate.books import text_of
from firstlight.evaluate.haystack import BOOK, Draw, pages
from firstlight.evaluate.needle import station
from firstlight.evaluate.retrieval import Puzzle, Question

COMMON, FREQUENT = 10, 3
LONG = 4096
"""Tokens from which on a list has RULER's own counts."""
_VOCABULARY = 2000
_ZETA2 = 1.6449340668482264
_DOTS = "..."


@dataclass(frozen=True)
class WordList:
    """Common words so many times each, then `count` others so many times each, shuffled; a fact in the middle."""

    common: list[str]
    others: list[str]
    times: tuple[int, int]
    fact: str
    seed: int

    def text(self, count: int) -> str:
        words = self.common * self.times[0] + self.others[:count] * self.times[1]
        random.Random(self.seed).shuffle(words)
        lines = [f"{i + 1}. {word}" for i, word in enumerate(words)]
        lines.insert(len(lines) // 2, self.fact.strip())
        return "\n".join(lines)


@dataclass(frozen=True)
class CodedText:
    """About `count` words, of which the one of rank k stands count / (zeta(2) k^2) times; a fact in the middle."""

    words: list[str]
    fact: str
    seed: int

    def text(self, count: int) -> str:
        count += 40  # at which the first four ranks differ
        times = [round(count / _ZETA2 / rank**2) for rank in range(1, len(self.words) + 1)]
        drawn = [word for word, n in zip(self.words, times) for _ in range(n)]
        random.Random(self.seed).shuffle(drawn)
        middle = len(drawn) // 2
        return f"{' '.join(drawn[:middle])}\n{self.fact.strip()}\n{' '.join(drawn[middle:])}"


def common_words(draw: Draw) -> Puzzle:
    """`cwe`."""
    dice = draw.dice
    words = dice.sample(book_words(), len(book_words()))
    fact, second = station(dice)
    times = (30, 3) if draw.length >= LONG else (10, 1)
    body = WordList(words[:COMMON], words[COMMON:], times, fact, dice.randrange(1 << 30))
    asked = f"Which {COMMON} words are the most common ones of the list?"
    lead = f"The {COMMON} most common words of the list are: 1."
    question = Question(asked, lead, tuple(body.common), 80)
    opening = f"Read this numbered list, in which some words stand more often than others. An example: {_example()}"
    return Puzzle(opening, body, pages(dice), question, second, None)


def frequent_words(draw: Draw) -> Puzzle:
    """`fwe`."""
    dice = draw.dice
    words = ["".join(dice.choices(string.ascii_lowercase, k=6)) for _ in range(_VOCABULARY)]
    fact, second = station(dice)
    body = CodedText([_DOTS, *words], fact, dice.randrange(1 << 30))
    asked = f"Which {FREQUENT} words stand in the coded text most often? Dots are no words."
    lead = f"The {FREQUENT} words that stand in the coded text most often are"
    question = Question(asked, lead, tuple(words[:FREQUENT]), 40)
    opening = "Read this coded text, and keep in mind how often each word stands in it."
    return Puzzle(opening, body, pages(dice), question, second, None)


@functools.cache
def book_words() -> list[str]:
    """Words of the book, of 4 to 9 letters, in alphabetical order."""
    return sorted(set(re.findall(r"\b[a-z]{4,9}\b", text_of(BOOK))))


def _example() -> str:
    words = ["river", "stone", "river", "paper", "stone", "river", "cloud", "stone"]
    listed = " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))
    return f"{listed} The 2 most common words of the list are: 1. river 2. stone\n\nThe list:"
