"""Passkeys in a book: the recall task that shows which heads need far context (DuoAttention, arXiv 2410.10819, 3.2).

Sequences of words of a phonetic alphabet lie at random depths of a running text; the end asks for all of them, and the
answers are written out, since they are read and not sampled. Natural text has few places that need recall: a loss over
it would hardly see the heads that do it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.prompt.tokenizer import Tokenizer

_ALPHABET = """alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec
romeo sierra tango uniform victor whiskey xray yankee zulu"""
WORDS = _ALPHABET.split()
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
MOST = len(_ORDINALS)
_NEEDLE = "\nRemember this: the {} passkey to the vault is:"
_QUESTION = "\n\nThese are the passkeys to the vault that the text names."
_ASKED = "\nThe {} passkey to the vault is:"
_DEPTHS = (0.05, 0.95)


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers; row `answer_rows[i]` is the one that foretells token `answer_rows[i] + 1`."""

    ids: Tensor
    """i64 [N]."""
    answer_rows: Tensor
    """i64 [A], ascending."""


class Passkeys:
    """Samples drawn from one text: sample i of a seed is the same whenever it is drawn."""

    def __init__(self, tokenizer: Tokenizer, text: str, *, count: int, words: int, seed: int) -> None:
        self._encode, self._bos = tokenizer.encode, tokenizer.bos_ids
        self._book = tokenizer.encode(text)
        self._count, self._words, self._seed = count, words, seed

    def draw(self, number: int, length: int) -> Sample:
        """Sample `number` of about `length` tokens, never more. UserError if passkeys alone are longer than that."""
        rng = random.Random(f"{self._seed}:{number}")
        passkeys = [" " + " ".join(rng.choices(WORDS, k=self._words)) for _ in range(self._count)]
        needles = [self._encode(_NEEDLE.format(o) + k + ".\n") for o, k in zip(_ORDINALS, passkeys)]
        end, answers = self._answers(passkeys)
        room = length - len(self._bos) - sum(map(len, needles)) - len(end)
        if room < 1 or room > len(self._book):
            raise UserError(
                f"a sample of {length} tokens would have {room} of the text, which has {len(self._book)}; "
                "change the length, or the number of passkeys and of their words"
            )
        begin = rng.randrange(len(self._book) - room + 1)
        places = sorted(int(room * rng.uniform(*_DEPTHS)) for _ in needles)
        ids = list(self._bos)
        for needle, a, b in zip(needles, [0, *places], places):
            ids += self._book[begin + a : begin + b] + needle
        ids += self._book[begin + places[-1] : begin + room]
        return Sample(torch.tensor(ids + end), torch.tensor(answers) + len(ids) - 1)

    def _answers(self, passkeys: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens at the end, and which of them are answers."""
        ids = self._encode(_QUESTION)
        answers: list[int] = []
        for ordinal, passkey in zip(_ORDINALS, passkeys):
            ids += self._encode(_ASKED.format(ordinal))
            answer = self._encode(passkey)
            answers += range(len(ids), len(ids) + len(answer))
            ids += answer
        return ids, answers
