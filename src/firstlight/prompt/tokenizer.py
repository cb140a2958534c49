"""Text to token ids and back: the first step of a prompt, and the last of an answer.

Built from GGUF metadata (`gguf_vocabulary`) or from a tokenizer.json (`json_vocabulary`). Each token is a string of
bytes, so decoding is joining bytes, which is what lets `detokenize` stream them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import Range
from firstlight.prompt.gguf_vocabulary import vocabulary_from_gguf
from firstlight.prompt.json_vocabulary import vocabulary_from_directory
from firstlight.prompt.vocabulary import Vocabulary


class Tokenizer:
    """Ids of a text and text of ids, for one model. Safe to use from several threads.

    `roles` are the ids of tokens by what they are for, as far as the model has them: bos, eos, unk, pad, fim_prefix,
    fim_suffix, fim_middle, fim_pad, repo_name, file_sep. `eos_ids` are all tokens that end an answer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = max(vocabulary.tokens, default=-1) + 1
        self.special_tokens: Mapping[str, int] = vocabulary.specials
        self.special_ids = frozenset(vocabulary.specials.values())
        self.roles: Mapping[str, int] = vocabulary.roles
        self.eos_ids = vocabulary.eos_ids
        self.bos_ids = list(vocabulary.bos_ids)
        self.chat_template = vocabulary.chat_template
        names = sorted(filter(None, vocabulary.specials), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, names))) if names else None

    @classmethod
    def from_source(cls, source: Mapping[str, Any] | Path) -> Tokenizer:
        """From GGUF metadata (its `tokenizer.*` keys) or from a directory with tokenizer.json."""
        return cls(vocabulary_from_directory(source) if isinstance(source, Path) else vocabulary_from_gguf(source))

    def encode(self, text: str, *, special: bool = False, plain: Sequence[Range] = ()) -> list[int]:
        """Token ids of a text; no BOS is added (`bos_ids` are the caller's).

        `special` reads control tokens written in the text as such, which a rendered chat template needs; otherwise they
        are ordinary text, so that a document cannot forge them. So they are in the spans `plain` of the text's
        characters, ascending. UserError if the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text holds lone surrogates, which no UTF-8 text has; clean the input") from None
        if special and plain and (forged := self._forged(text, plain)):
            return self._encode_around(text, forged)
        return self._vocabulary.encode(text, special=special)

    def _forged(self, text: str, plain: Sequence[Range]) -> set[Range]:
        """Where control tokens are spelled in text that is `plain`."""
        hits = [hit.span() for hit in self._controls.finditer(text)] if self._controls else []
        return {(lo, hi) for lo, hi in hits if any(lo < end and start < hi for start, end in plain)}

    def _encode_around(self, text: str, forged: set[Range]) -> list[int]:
        """Control tokens are read as such but for some, piece by piece."""
        assert self._controls is not None
        ids, done = [], 0
        for hit in self._controls.finditer(text):
            if hit.span() not in forged:
                ids += self._vocabulary.encode(text[done : hit.start()], special=False)
                ids.append(self.special_tokens[hit[0]])
                done = hit.end()
        return [*ids, *self._vocabulary.encode(text[done:], special=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: control tokens are skipped, bytes that are not UTF-8 become U+FFFD.

        Where a text is cut as if a space stood before it (`encode` of some SentencePiece models), that space goes.
        """
        joined = b"".join(map(self.text_bytes, ids))
        return joined.removeprefix(b" " if self._vocabulary.space_before else b"").decode(errors="replace")

    def text_bytes(self, token: int) -> bytes:
        """What a token adds to the text: its bytes, or nothing for a control token."""
        return b"" if token in self.special_ids else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name, an id that has no token has none."""
        text = self._vocabulary.tokens.get(token, "")  # embeddings may be padded past the vocabulary
        return text.encode() if token in self._vocabulary.added else self._vocabulary.piece(text)

    @property
    def template_tokens(self) -> dict[str, Any]:
        """The texts that chat templates put where a text begins and ends; empty where the model has none."""
        texts = {role: self._vocabulary.tokens.get(self.roles.get(role, -1), "") for role in ("bos", "eos")}
        return {f"{role}_token": text for role, text in texts.items()}

    def begun(self, ids: list[int]) -> list[int]:
        """Ids with the BOS that the model expects, put before them unless a chat template has done it."""
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else [*self.bos_ids, *ids]
