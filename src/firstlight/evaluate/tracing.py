"""Variable tracing, RULER's `vt` (arXiv 2404.06654, section 3.2): a chain of assignments that lies scattered in noise.

`VAR AJKLM = 48213`, `VAR QWERT = VAR AJKLM`, and so on, four hops; all five variables that hold the number are asked
for. RULER's own noise is a line over and over, and a short solved example stands before it; so it is here.
"""

from __future__ import annotations

import random
import string

from firstlight.evaluate.haystack import Draw, Haystack, line, pages
from firstlight.evaluate.needle import station
from firstlight.evaluate.retrieval import Puzzle, Question

HOPS = 4
_QUESTION = "Which variables have the value {value} in the text? Name all of them."
_LEAD = "By the chain of assignments in the text, five variables have the value {value}:"


def trace(draw: Draw) -> Puzzle:
    """One chain; its links stand in their order, at drawn depths."""
    dice = draw.dice
    names, value = _names(dice), str(dice.randrange(10**4, 10**5))
    depths = sorted(dice.random() for _ in names)
    facts = [(at, f" {link}") for at, link in zip(depths, _chain(names, value))]
    fact, second = station(dice)
    body = Haystack(line(dice), [*facts, (dice.random(), fact)])
    question = Question(_QUESTION.format(value=value), _LEAD.format(value=value), tuple(names), 48)
    return Puzzle(_opening(dice), body, pages(dice), question, second, None)


def _opening(dice: random.Random) -> str:
    names, value = _names(dice), str(dice.randrange(10**4, 10**5))
    example = " ".join(_chain(names, value))
    solved = f"{_QUESTION.format(value=value)} {_LEAD.format(value=value)} {', '.join(names)}."
    return f"Follow the assignments of variables that are hidden in a text. An example: {example} {solved}\n\nThe text:"


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}." for i, name in enumerate(names)]


def _names(dice: random.Random) -> list[str]:
    return ["".join(dice.choices(string.ascii_uppercase, k=5)) for _ in range(HOPS + 1)]
