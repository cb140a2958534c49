"""A retrieval sample: a text, what is asked about it, and where the question stands. How it is put and answered.

Every task of retrieval is a `Puzzle`, made in `needle.py`, `tracing.py`, `counting.py` or `hops.py`. The answer is
begun for the model, as RULER does (arXiv 2404.06654, appendix), and is worth the share of the values that occur in it.

The question stands in one of three places; a method that guesses from the last rows what matters will be told apart:

- `last`: after the text. Then a `second`, different question is put in the same conversation, on the cache that the
  first one left: a method that keeps only what the first question needed fails there.
- `first`: before the text, and not again; the prompt's last rows know nothing of it.
- `tail`: last, after a filler of up to 1,024 tokens: nothing that is asked for is near it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.engine.engine import Engine
from firstlight.evaluate.asking import ask
from firstlight.evaluate.haystack import Growing, longest
from firstlight.prompt.chat import render_chat
from firstlight.prompt.encoder import Encoder
from firstlight.prompt.spans import as_parts
from firstlight.prompt.tokenizer import Tokenizer

PLACEMENTS = ("last", "first", "tail")
"""Where the question may stand; a second one is put after `last`."""
SECOND = "second"
RESERVED = 128
"""Tokens of the stated length that are left for answers, as RULER counts."""
TAIL, TAIL_SHARE = 1024, 0.25
"""Tokens of the filler before a question at most, and their share of the length at most."""

_MARK = "0-the-first-answer-0"
_BEFORE = "Read this text, and answer a question about it: {}"
_CLOSING = "Answer the question that was put before the text."
_LEAD = "The answer is"


@dataclass(frozen=True)
class Question:
    """What is asked, how the answer begins, what has to be in it, and how many tokens it may take."""

    words: str
    lead: str
    values: tuple[str, ...]
    num_answer: int


@dataclass(frozen=True)
class Puzzle:
    """A text to be read, an introduction to it, sentences that fill, a question and a different one."""

    opening: str
    body: Growing
    filler: Sequence[str]
    question: Question
    second: Question
    depth: float | None
    """Where in the text the answer lies, 0..1; None where it lies in several places."""


@dataclass(frozen=True)
class Turn:
    """One answer: the tokens that ask for it (in the prompt, for the first), and what it has to hold."""

    at: str
    asks: list[int]
    values: tuple[str, ...]
    num_answer: int


@dataclass(frozen=True)
class Sample:
    """A prompt and the turns of the conversation about it."""

    prompt: PromptIds
    turns: tuple[Turn, ...]
    eos_ids: frozenset[int]
    depth: float | None

    @property
    def ids(self) -> list[int]:
        return list(self.prompt.ids)

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt at most, those of the second question included."""
        return sum(len(turn.asks) + turn.num_answer for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Tokens of context that it takes at most."""
        return len(self.prompt.ids) + self.num_generated


class Conversation:
    """Chooses tokens: an answer, the next question word by word, its answer."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._ends: list[int] = []
        self._forced: list[int] = []
        self._begin = 0

    def choose(self, generated: Sequence[int], logits: Tensor) -> int:
        """The likeliest token, but a question from where the answer before it ends."""
        if self._forced:
            return self._forced.pop(0)
        token, turns = int(logits.argmax()), self._sample.turns
        if len(self._ends) == len(turns):
            return token
        turn = turns[len(self._ends)]
        if token not in self._sample.eos_ids and len(generated) - self._begin < turn.num_answer:
            return token
        self._ends.append(len(generated))
        if len(self._ends) == len(turns):
            return token
        asks = turns[len(self._ends)].asks
        self._begin, self._forced = len(generated) + len(asks), asks[1:]
        return asks[0]

    def answers(self, token_ids: Sequence[int]) -> list[list[int]]:
        """The answers in what was generated, each up to its end."""
        found, begin = [], 0
        for i, turn in enumerate(self._sample.turns):
            begin += len(turn.asks)
            end = self._ends[i] if i < len(self._ends) else begin + turn.num_answer
            found.append(list(token_ids[begin:end]))
            begin = end
        return found


def sample(tokenizer: Tokenizer, puzzle: Puzzle, placement: str, length: int) -> Sample:
    """A puzzle as a prompt of at most `length` - RESERVED tokens. Raises UserError if it doesn't fit into them."""
    question, limit = puzzle.question, length - RESERVED
    filler = _filler(tokenizer, puzzle, min(TAIL, int(length * TAIL_SHARE))) if placement == "tail" else ""

    def prompt(count: int) -> PromptIds:
        text = f"{puzzle.opening}\n\n{puzzle.body.text(count)}"
        if placement == "first":
            return _opening(tokenizer, f"{_BEFORE.format(question.words)}\n\n{text}", _CLOSING, _LEAD)
        return _opening(tokenizer, f"{text}\n\n{filler}" if filler else text, question.words, question.lead)

    made = longest(prompt, lambda p: len(p.ids), limit)
    if made is None:
        raise UserError(f"{length} tokens are too few for this task; give more --lengths")
    turns = [Turn(placement, [], question.values, question.num_answer)]
    if placement == "last":
        other = puzzle.second
        turns.append(Turn(SECOND, _turn(tokenizer, question, other), other.values, other.num_answer))
    return Sample(made, tuple(turns), tokenizer.eos_ids, puzzle.depth)


def measure(engine: Engine, tokenizer: Tokenizer, what: Sample) -> dict[str, Any]:
    """The record of a sample: the share of right values in each of its answers, and the answers."""
    conversation = Conversation(what)
    asked = ask(engine, what.prompt, conversation.choose, what.num_generated)
    answers = [tokenizer.decode(ids) for ids in conversation.answers(asked.token_ids)]
    right = {turn.at: share_of(turn.values, answer) for turn, answer in zip(what.turns, answers)}
    return {"depth": what.depth, **asked.facts(), **right, "answers": answers}


def share_of(values: Sequence[str], answer: str) -> float:
    """How many of the values occur in the answer, whatever the case of letters (RULER's metric)."""
    return sum(value.lower() in answer.lower() for value in values) / len(values)


def _filler(tokenizer: Tokenizer, puzzle: Puzzle, limit: int) -> str:
    """Sentences of the puzzle from the far end, about `limit` tokens."""

    def made(count: int) -> str:
        return "".join(puzzle.filler[-1 - i % len(puzzle.filler)] for i in range(count)).strip()

    return longest(made, lambda text: len(tokenizer.encode(text)), limit) or ""


def _opening(tokenizer: Tokenizer, text: str, question: str, lead: str) -> PromptIds:
    """The first turn, with the answer begun; models without a chat template get plain text."""
    encoder = Encoder(tokenizer, "the model", marks=True)
    if tokenizer.chat_template is None:
        return encoder.text(as_parts(text, f"{question}\n\n{lead}"))
    chat = encoder.chat([{"role": "user", "content": as_parts(text, question)}])
    return replace(chat, ids=[*chat.ids, *tokenizer.encode(lead)])


def _turn(tokenizer: Tokenizer, question: Question, other: Question) -> list[int]:
    """From the end of the first answer to the beginning of the second."""
    template = tokenizer.chat_template
    if template is None:
        return tokenizer.encode(f"\n\n{other.words}\n\n{other.lead}")
    speakers = zip(("user", "assistant", "user"), (question.words, _MARK, other.words))
    messages = [{"role": role, "content": content} for role, content in speakers]
    chat = render_chat(template, messages, **tokenizer.template_tokens)
    _, mark, rest = chat.partition(_MARK)
    if not mark:
        raise UserError("the model's chat template leaves answers out, so it has no second turn; choose other --tasks")
    return [*tokenizer.encode(rest, special=True), *tokenizer.encode(other.lead)]
