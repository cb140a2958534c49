"""What a tokenizer is built from, whichever file it came from: tokens, their kinds, their roles, and how text is cut.

`gguf_vocabulary` and `json_vocabulary` make one; `tokenizer` is what the rest of the path sees of it.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer as Backend

from firstlight.core.errors import UserError

_T = TypeVar("_T")

SPACE = "\u2581"  # SentencePiece writes a space as this
# Control tokens that end an answer whatever else the file names: many files name only one of the ends they use.
_ENDS = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>"}
)
# Roles that a file may leave unnamed, by the texts that models use for them.
_ROLE_TEXTS = {
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
    "fim_pad": ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    "repo_name": ("<|repo_name|>", "<repo_name>", "<reponame>", "<|fim_repo|>"),
    "file_sep": ("<|file_sep|>", "<file_sep>"),
}


class Encoder(Protocol):
    """Cuts text into ids; `special` reads control tokens in the text as such."""

    def __call__(self, text: str, *, special: bool) -> list[int]: ...


@dataclass(frozen=True)
class Vocabulary:
    """`specials` are the control tokens, `added` all tokens that are taken as they are written (control ones too).

    `tokens` is by id, and may have holes. `piece` gives the bytes of a token that is not in `added`. `space_before`
    says that a text is cut as if a space stood before it.
    """

    encode: Encoder
    piece: Callable[[str], bytes]
    tokens: Mapping[int, str]
    specials: dict[str, int]
    added: frozenset[int]
    roles: dict[str, int]
    eos_ids: frozenset[int]
    bos_ids: tuple[int, ...]
    space_before: bool
    chat_template: str | None


class LibraryEncoder:
    """The `tokenizers` library as an encoder. Its switch for control tokens belongs to the backend, hence the lock."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()

    def __call__(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            self._backend.encode_special_tokens = not special
            return guarded(
                lambda: list(self._backend.encode(text, add_special_tokens=False).ids),
                "the model's tokenizer fails on this text",
            )


def guarded(call: Callable[[], _T], what: str) -> _T:
    """The call's result; whatever the library raises on bad data becomes one line. Its panics are no `Exception`s."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({' '.join(str(error).split())[:80]}); fetch the model again") from None


def find_roles(named: Mapping[str, int], specials: Mapping[str, int]) -> dict[str, int]:
    """Ids by role: those that the file names, then those whose text is known."""
    found = {role: next((specials[t] for t in texts if t in specials), None) for role, texts in _ROLE_TEXTS.items()}
    return {role: token for role, token in found.items() if token is not None} | dict(named)


def is_role_text(text: str) -> bool:
    """Whether a token of this text has a role, so that it is a control token whatever its file calls it."""
    return any(text in texts for texts in _ROLE_TEXTS.values())


def find_ends(named: Iterable[int], specials: Mapping[str, int]) -> frozenset[int]:
    """Every token that ends an answer: those that the file names, and those whose text is known."""
    return frozenset(named) | {token for text, token in specials.items() if text in _ENDS}


def token_ids(value: Any, tokens: Container[int]) -> list[int]:
    """The valid ids in a setting that is an id, a list of ids or nothing."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i in tokens]


def byte_level_piece(token: str) -> bytes:
    """The bytes of a byte-level token; a text that is not in its alphabet stands for itself."""
    table = _byte_of_char()
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


def sentencepiece_piece(token: str) -> bytes:
    """The bytes of a SentencePiece token: <0xNN> is one byte, anything else text with its spaces written as U+2581."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character: itself where it is one, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
