"""Questions about documents, in the places of RULER's `qa_1` and `qa_2` (arXiv 2404.06654, section 3.4).

RULER takes SQuAD and HotpotQA, whose texts aren't carried here. These documents are passages of a book, numbered, and
some of them end with a record about people who never lived, so that no model knows the answer: `qa_1` asks for one
record, `qa_2` needs two of them, which stand far apart (the keeper's town, then that town's mayor). Four more keepers
and mayors of other towns have records of the same form, so a word of the question alone finds nothing.
"""

from __future__ import annotations

import random
from functools import partial

from firstlight.evaluate.books import text_of
from firstlight.evaluate.haystack import BOOK, Draw, Haystack, pages, spread
from firstlight.evaluate.needle import TOWNS, station
from firstlight.evaluate.retrieval import Puzzle, Question

_FIRST = (
    "Agnes",
    "Bertram",
    "Clara",
    "Dorian",
    "Edith",
    "Fergus",
    "Greta",
    "Hugo",
    "Isolde",
    "Jasper",
    "Lydia",
    "Magnus",
)
_LAST = ("Abernathy", "Blackwood", "Carmody", "Dunmore", "Everhart", "Fairweather", "Grimshaw", "Hollis", "Marchbanks")
PEOPLE = 5
_KEEPER = " {keeper} keeps the lighthouse of {town}."
_MAYOR = " The mayor of {town} is {mayor}."


def documents(hops: int, draw: Draw) -> Puzzle:
    """Passages with records; one keeper is asked for, and with two hops the mayor behind."""
    dice, depth = draw.dice, draw.depth()
    towns, people = dice.sample(TOWNS, PEOPLE), _people(dice)
    keepers, mayors = people[:PEOPLE], people[PEOPLE:]
    facts = []
    for at, town, keeper, mayor in zip(spread(depth, PEOPLE), towns, keepers, mayors):
        facts.append((at, _KEEPER.format(keeper=keeper, town=town)))
        facts.append(((at + 0.5) % 1, _MAYOR.format(mayor=mayor, town=town)))
    fact, second = station(dice)
    body = Haystack(_passages(dice), [*facts, ((depth + 0.3) % 1, fact)])
    question = _one(keepers[0], towns[0]) if hops == 1 else _two(keepers[0], mayors[0])
    opening = "Answer a question from these documents, with nothing but the name."
    return Puzzle(opening, body, pages(dice), question, second, depth if hops == 1 else None)


MAKERS = {"qa_1": partial(documents, 1), "qa_2": partial(documents, 2)}


def _one(keeper: str, town: str) -> Question:
    lead = f"{keeper} keeps the lighthouse of"
    return Question(f"Of which town does {keeper} keep the lighthouse?", lead, (town,), 16)


def _two(keeper: str, mayor: str) -> Question:
    asked = f"Who is the mayor of the town whose lighthouse {keeper} keeps?"
    return Question(asked, f"The mayor of the town whose lighthouse {keeper} keeps is", (mayor,), 24)


def _people(dice: random.Random) -> list[str]:
    """Different names."""
    firsts = dice.sample(_FIRST, 2 * PEOPLE)
    return [f"{first} {dice.choice(_LAST)}" for first in firsts]


def _passages(dice: random.Random) -> list[str]:
    """The book's paragraphs from a drawn place on, numbered as documents."""
    found = [text for text in text_of(BOOK).split("\n\n") if 200 < len(text) < 1000]
    start = dice.randrange(len(found))
    return [f"\n\nDocument {i + 1}: {text.strip()}" for i, text in enumerate(found[start:] + found[:start])]
