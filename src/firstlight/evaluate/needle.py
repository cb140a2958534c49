"""One needle in a haystack, by the rules of RULER (arXiv 2404.06654, section 3 and table 2), made from real text.

A sentence that gives a key a value is put between the sentences of a long text, at a depth; the question about the key
comes last, the answer is begun for the model, and a sample is right if the value occurs in what follows. RULER's three
tasks differ in text and value: `niah_single_1` one line over and over and a number of seven digits, `niah_single_2`
running text and a number, `niah_single_3` running text and a UUID. Where RULER repeats a fixed line of noise and takes
essays, a line and the pages of a book are drawn here.

Ours besides: a second fact of another kind lies in the text, and after the first answer a second question asks for it,
in the same conversation, on the cache that the first one left. A method that keeps only what the first question needed
fails there.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.engine.engine import Engine
from firstlight.evaluate.asking import ask
from firstlight.evaluate.books import text_of
from firstlight.prompt.chat import render_chat
from firstlight.prompt.encoder import Encoder
from firstlight.prompt.spans import as_parts
from firstlight.prompt.tokenizer import Tokenizer

KINDS = {"niah_single_1": ("line", "number"), "niah_single_2": ("pages", "number"), "niah_single_3": ("pages", "uuid")}
"""Task -> what the haystack is made of, and what the value is."""
BOOK = "the-federalist-papers"
RESERVED = 128
"""Tokens of the stated length that are left for answers, as RULER counts."""
ANSWER = {"number": 24, "uuid": 56}
"""Tokens of an answer at most, by what is asked for."""

_LINE_WORDS = 25
_GOLDEN = 0.6180339887498949
_MARK = "0-the-first-answer-0"
_INTRODUCTION = "Read this text. A secret {kind} is hidden in it, and you will be asked for it."
_NEEDLE = "The secret {kind} of the {key} is {value}."
_QUESTION = "What is the secret {kind} of the {key} in the text?"
_ANSWER = "The secret {kind} of the {key} in the text is"
_OTHER_NEEDLE = "The train to {key} leaves from platform {value}."
_OTHER_QUESTION = "From which platform does the train to {key} leave, by the text?"
_OTHER_ANSWER = "By the text, the train to {key} leaves from platform"

_COLOURS = ("amber", "black", "blue", "brown", "copper", "golden", "green", "grey", "orange", "pink", "purple", "red")
_THINGS = ("anchor", "basket", "bell", "bridge", "candle", "clock", "garden", "hammer", "ladder", "lantern", "window")
_TOWNS = ("Aachen", "Bergen", "Cadiz", "Dublin", "Exeter", "Ghent", "Hanover", "Inverness", "Lisbon", "Naples", "Riga")


@dataclass(frozen=True)
class Sample:
    """A prompt, what to look for in the answers to its two questions, and how the conversation goes on in between."""

    prompt: PromptIds
    follow_up: list[int]
    eos_ids: frozenset[int]
    values: tuple[str, str]
    depth: float
    num_answer: int

    @property
    def ids(self) -> list[int]:
        return list(self.prompt.ids)


class Conversation:
    """Chooses tokens: a first answer, the second question word by word, a second answer."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._asked_at: int | None = None

    @property
    def num_tokens(self) -> int:
        """The most that may be generated."""
        return 2 * self._sample.num_answer + len(self._sample.follow_up)

    def choose(self, generated: Sequence[int], logits: Tensor) -> int:
        """The likeliest token, but the second question from where the first answer ends."""
        sample, token = self._sample, int(logits.argmax())
        if self._asked_at is None:
            if token not in sample.eos_ids and len(generated) < sample.num_answer:
                return token
            self._asked_at = len(generated)
        at = len(generated) - self._asked_at
        return sample.follow_up[at] if at < len(sample.follow_up) else token

    def answers(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The two answers in what was generated, each up to its end."""
        sample = self._sample
        turn = sample.num_answer if self._asked_at is None else self._asked_at
        second = list(token_ids[turn + len(sample.follow_up) :])[: sample.num_answer]
        end = next((i for i, token in enumerate(second) if token in sample.eos_ids), len(second))
        return list(token_ids[:turn]), second[:end]


def sample(tokenizer: Tokenizer, task: str, length: int, index: int, seed: int) -> Sample:
    """Sample number `index`: it depends on these arguments only. Raises UserError if nothing fits into the length."""
    dice = random.Random(f"{seed}:{task}:{length}:{index}")
    haystack, kind = KINDS[task]
    words = {"kind": "code" if kind == "uuid" else "number", "key": f"{dice.choice(_COLOURS)} {dice.choice(_THINGS)}"}
    value, town, platform = _value(dice, kind), dice.choice(_TOWNS), str(dice.randrange(100, 1000))
    questions = _QUESTION.format(**words), _OTHER_QUESTION.format(key=town)
    leads = _ANSWER.format(**words), _OTHER_ANSWER.format(key=town)
    depth = (index * _GOLDEN + 0.5 * dice.random() / 8) % 1
    needles = [(depth, _NEEDLE.format(value=value, **words))]
    needles.append(((depth + 0.5) % 1, _OTHER_NEEDLE.format(key=town, value=platform)))
    sentences = _line(dice) if haystack == "line" else _pages(dice)

    def prompt(text: str) -> PromptIds:
        return _opening(tokenizer, f"{_INTRODUCTION.format(**words)}\n\n{text}", questions[0], leads[0])

    made = _fill(tokenizer, sentences, needles, length - RESERVED, prompt)
    follow_up = _turn(tokenizer, questions, leads)
    return Sample(made, follow_up, tokenizer.eos_ids, (value, platform), depth, ANSWER[kind])


def measure(engine: Engine, tokenizer: Tokenizer, what: Sample) -> dict[str, Any]:
    """The record of a sample: whether each of its two answers holds its value."""
    conversation = Conversation(what)
    asked = ask(engine, what.prompt, conversation.choose, conversation.num_tokens)
    answers = [tokenizer.decode(ids) for ids in conversation.answers(asked.token_ids)]
    right = [value.lower() in answer.lower() for value, answer in zip(what.values, answers)]
    return {"depth": what.depth, **asked.facts(), "last": right[0], "second": right[1], "answers": answers}


def _value(dice: random.Random, kind: str) -> str:
    return str(uuid.UUID(int=dice.getrandbits(128), version=4)) if kind == "uuid" else str(dice.randrange(10**6, 10**7))


def _pages(dice: random.Random) -> list[str]:
    """The book's sentences from a drawn place on, round to it again; each with the white space before it."""
    sentences = re.findall(r"\s*\S.*?(?:[.!?][”’)]*(?=\s)|\Z)", text_of(BOOK), re.DOTALL)
    start = dice.randrange(len(sentences))
    return sentences[start:] + sentences[:start]


def _line(dice: random.Random) -> list[str]:
    """One line of the book, some sentences long, over and over."""
    line = ""
    for sentence in _pages(dice):
        line = f"{line} {' '.join(sentence.split())}".strip()
        if len(line.split()) >= _LINE_WORDS:
            break
    return [f"\n{line}"]


def _fill(tokenizer: Tokenizer, sentences: list[str], needles: Any, limit: int, prompt: Any) -> PromptIds:
    """The longest prompt of at most `limit` tokens: sentences, with the needles between them."""
    sizes = [len(tokenizer.encode(sentence)) for sentence in sentences]
    room = limit - len(prompt("".join(f" {needle}" for _, needle in needles)).ids)
    count = 0
    while (size := sizes[count % len(sizes)]) <= room:
        room, count = room - size, count + 1
    while count > 0:
        hay = [sentences[i % len(sentences)] for i in range(count)]
        for depth, needle in sorted(needles, reverse=True):
            hay.insert(round(depth * count), f" {needle}")
        made: PromptIds = prompt("".join(hay).strip())
        if len(made.ids) <= limit:
            return made
        count -= 1
    raise UserError(f"{limit + RESERVED} tokens are too few for a haystack; give more --lengths")


def _opening(tokenizer: Tokenizer, text: str, question: str, lead: str) -> PromptIds:
    """The first turn, with the answer begun; models without a chat template get plain text."""
    encoder = Encoder(tokenizer, "the model", marks=True)
    if tokenizer.chat_template is None:
        return encoder.text(as_parts(text, f"{question}\n\n{lead}"))
    chat = encoder.chat([{"role": "user", "content": as_parts(text, question)}])
    return replace(chat, ids=[*chat.ids, *tokenizer.encode(lead)])


def _turn(tokenizer: Tokenizer, questions: tuple[str, str], leads: tuple[str, str]) -> list[int]:
    """From the end of the first answer to the beginning of the second."""
    template = tokenizer.chat_template
    if template is None:
        return tokenizer.encode(f"\n\n{questions[1]}\n\n{leads[1]}")
    speakers = zip(("user", "assistant", "user"), (questions[0], _MARK, questions[1]))
    messages = [{"role": role, "content": content} for role, content in speakers]
    chat = render_chat(template, messages, **tokenizer.template_tokens)
    _, mark, rest = chat.partition(_MARK)
    if not mark:
        raise UserError("the model's chat template leaves answers out, so it has no second turn; choose other --tasks")
    return [*tokenizer.encode(rest, special=True), *tokenizer.encode(leads[1])]
