"""Needles in a haystack, by the rules of RULER (arXiv 2404.06654, section 3 and table 2), made from real text.

A sentence gives a key a value; the question asks for the values of keys. RULER's tasks differ in the haystack (one line
over and over, running text, or other needles), in what keys and values are, and in how many of them there are:

    niah_single_1    one line, number        niah_multikey_1  running text, four keys, one asked for
    niah_single_2    running text, number    niah_multikey_2  other needles all over, number
    niah_single_3    running text, UUID      niah_multikey_3  other needles all over, UUIDs as keys and values
    niah_multivalue  one key, four values    niah_multiquery  four keys, all asked for

Where RULER takes a fixed line of noise and essays, a line and the pages of a book are drawn here.
`lost_in_the_middle` is the key-value retrieval of Liu et al. (arXiv 2307.03172, section 4): a JSON object of UUIDs, one
of which is asked for.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from firstlight.evaluate.haystack import Draw, Haystack, line, pages, spread
from firstlight.evaluate.retrieval import Puzzle, Question

ANSWER = {"number": 24, "code": 56}
"""Tokens of an answer at most, by what is asked for."""
_FOUR = 80
"""Those of four numbers."""
_CROWD = 1400
"""Needles that a haystack of needles has before it repeats itself."""
_INTRODUCTION = "Read this text. A secret {kind} is hidden in it, and you will be asked for it."
_MANY = "Read this text. Secret {kind}s are hidden in it, and you will be asked for them."
_NEEDLE = "The secret {kind} of the {key} is {value}."
_ONE_OF = "One of the secret {kind}s of the {key} is {value}."
_QUESTION = "What is the secret {kind} of the {key} in the text?"
_ANSWER = "The secret {kind} of the {key} in the text is"

_COLOURS = ("amber", "black", "blue", "brown", "copper", "golden", "green", "grey", "orange", "pink", "purple", "red")
_THINGS = ("anchor", "basket", "bell", "bridge", "candle", "clock", "garden", "hammer", "ladder", "lantern", "window")
TOWNS = ("Aachen", "Bergen", "Cadiz", "Dublin", "Exeter", "Ghent", "Hanover", "Inverness", "Lisbon", "Naples", "Riga")


def station(dice: random.Random) -> tuple[str, Question]:
    """A fact of another kind, and the question about it that is put second."""
    town, platform = dice.choice(TOWNS), str(dice.randrange(100, 1000))
    words = f"From which platform does the train to {town} leave, by the text?"
    lead = f"By the text, the train to {town} leaves from platform"
    return f" The train to {town} leaves from platform {platform}.", Question(words, lead, (platform,), 24)


def single(kind: str, hay: Callable[[Any], list[str]], others: int, draw: Draw) -> Puzzle:
    """One needle, or one of several, by its key."""
    dice = draw.dice
    words = {"kind": kind, "key": _key(dice)}
    value = _value(dice, kind)
    fact, second = station(dice)
    depth = draw.depth()
    facts = [(depth, " " + _NEEDLE.format(value=value, **words)), ((depth + 0.5) % 1, fact)]
    sentences = hay(dice)
    for at in spread(depth, others + 1)[1:]:
        facts.append((at, " " + _NEEDLE.format(kind=kind, key=_key(dice, words["key"]), value=_value(dice, kind))))
    return _puzzle(_INTRODUCTION.format(**words), Haystack(sentences, facts), _about(words, value), second, depth, dice)


def crowd(kind: str, draw: Draw) -> Puzzle:
    """One needle among needles of the same form; the second question asks for another one."""
    dice, depth = draw.dice, draw.depth()
    keys = [str(_uuid(dice)) for _ in range(_CROWD)] if kind == "code" else _many_keys(dice)
    told = [({"kind": kind, "key": key}, _value(dice, kind)) for key in keys]
    needles = ["\n" + _needle(words, value) for words, value in told]
    asked = [(depth, needles[0]), ((depth + 0.5) % 1, needles[1])]
    first, second = (_about(*fact) for fact in told[:2])
    return _puzzle(_MANY.format(kind=kind), Haystack(needles[2:], asked), first, second, depth, dice)


def multivalue(draw: Draw) -> Puzzle:
    """Four values of one key."""
    dice = draw.dice
    key, values = _key(dice), tuple(_value(dice, "number") for _ in range(4))
    depths = spread(draw.depth(), 4)
    facts = [(at, " " + _ONE_OF.format(kind="number", key=key, value=v)) for at, v in zip(depths, values)]
    asked = f"What are all the secret numbers of the {key} in the text?"
    lead = f"The four secret numbers of the {key} in the text are"
    return _scattered(facts, Question(asked, lead, values, _FOUR), dice)


def multiquery(draw: Draw) -> Puzzle:
    """Four keys, all of them asked for."""
    dice = draw.dice
    keys: list[str] = []
    while len(keys) < 4:
        keys.append(_key(dice, *keys))
    values = tuple(_value(dice, "number") for _ in keys)
    depths = spread(draw.depth(), 4)
    facts = [(at, " " + _needle({"kind": "number", "key": key}, value)) for at, key, value in zip(depths, keys, values)]
    named = ", ".join(f"the {key}" for key in keys[:-1]) + f" and the {keys[-1]}"
    asked = f"What are the secret numbers of {named} in the text?"
    lead = f"The secret numbers of {named} in the text are"
    return _scattered(facts, Question(asked, lead, values, _FOUR), dice)


def lost_in_the_middle(draw: Draw) -> Puzzle:
    """One value of a JSON object by its key; the second question asks for another one."""
    dice, depth = draw.dice, draw.depth()
    pairs = [(str(_uuid(dice)), str(_uuid(dice))) for _ in range(_CROWD)]
    lines = [f"\n{json.dumps(key)}: {json.dumps(value)}," for key, value in pairs]
    first, second = (
        Question(f'Which value has the key "{key}" in the JSON object?', f'The value of "{key}" is', (value,), 56)
        for key, value in pairs[:2]
    )
    body = Haystack(lines[2:], [(depth, lines[0]), ((depth + 0.5) % 1, lines[1])])
    return _puzzle("Take the value of a key from this JSON object.", body, first, second, depth, dice)


MAKERS: dict[str, Callable[[Draw], Puzzle]] = {
    "niah_single_1": partial(single, "number", line, 0),
    "niah_single_2": partial(single, "number", pages, 0),
    "niah_single_3": partial(single, "code", pages, 0),
    "niah_multikey_1": partial(single, "number", pages, 3),
    "niah_multikey_2": partial(crowd, "number"),
    "niah_multikey_3": partial(crowd, "code"),
    "niah_multivalue": multivalue,
    "niah_multiquery": multiquery,
    "lost_in_the_middle": lost_in_the_middle,
}


def _puzzle(opening: str, body: Haystack, first: Question, second: Question, depth: float, dice: Any) -> Puzzle:
    return Puzzle(opening, body, pages(dice), first, second, depth)


def _scattered(facts: list[tuple[float, str]], question: Question, dice: random.Random) -> Puzzle:
    """Facts all over the pages, and the station between two of them."""
    fact, second = station(dice)
    sentences = pages(dice)
    between = (facts[0][0] + 1 / 8) % 1
    body = Haystack(sentences, [*facts, (between, fact)])
    return Puzzle(_MANY.format(kind="number"), body, sentences, question, second, None)


def _needle(words: dict[str, str], value: str) -> str:
    return _NEEDLE.format(value=value, **words)


def _about(words: dict[str, str], value: str) -> Question:
    return Question(_QUESTION.format(**words), _ANSWER.format(**words), (value,), ANSWER[words["kind"]])


def _key(dice: random.Random, *taken: str) -> str:
    while (key := f"{dice.choice(_COLOURS)} {dice.choice(_THINGS)}") in taken:
        pass
    return key


def _many_keys(dice: random.Random) -> list[str]:
    """Different keys for a crowd, in a drawn order."""
    keys = [f"{colour} {thing} of {town}" for colour in _COLOURS for thing in _THINGS for town in TOWNS]
    dice.shuffle(keys)
    return keys


def _value(dice: random.Random, kind: str) -> str:
    return str(_uuid(dice)) if kind == "code" else str(dice.randrange(10**6, 10**7))


def _uuid(dice: random.Random) -> uuid.UUID:
    return uuid.UUID(int=dice.getrandbits(128), version=4)
