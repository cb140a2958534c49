"""Which tokens of a prompt are context, which are its question, and which are neither: the one place that decides.

*Context* is what somebody gave to be read, and all that a prompt editor may touch. The rules:

- A text in several parts (OpenAI's form, `[{"type": "text", "text": ...}, ...]`, which `-f FILE -p TEXT` becomes): the
  last part is the question, what comes before it is context.
- A text in one piece: its last paragraph is the question, what comes before is context.
- So it is with a text that is no chat, and with each message of a user. The question of a chat is its last one.
- A tool's message is context, and so is a prefilled document's text.
- Everything else is protected: what the template writes (roles, markers), system and assistant messages, questions,
  and prompts that come as ids.

User and tool messages are ordinary text: a control token that is spelled in them is none (`Tokenizer.encode`, `plain`).
That holds wherever the template writes messages as they are, but for white space around them; where it changes them in
other ways, nothing is context.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import Range

_READ_BY = ("user", "tool")
"""Whose messages are ordinary text."""
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


@dataclass(frozen=True)
class Told:
    """A text, of whose characters the first `context` are context; the rest is a question."""

    words: str
    context: int


@dataclass(frozen=True)
class Place:
    """Where a message lies in the text of a chat, and its context there: spans of characters; and its question."""

    whole: Range
    context: Range
    question: str


def told(content: Any, role: str = "user") -> Told:
    """A text, or the parts of one. Raises UserError on parts that aren't text."""
    if isinstance(content, str):
        if role == "tool":
            return Told(content, len(content))
        breaks = list(_BLANK_LINE.finditer(content.rstrip()))
        return Told(content, breaks[-1].start() if breaks else 0)
    texts = [_text_of(part) for part in content]
    joined = "\n\n".join(texts)
    return Told(joined, len(joined) if role == "tool" else len("\n\n".join(texts[:-1])))


def as_parts(*texts: str) -> list[dict[str, Any]]:
    """Texts as the parts of one: what is read before what is asked."""
    return [{"type": "text", "text": text} for text in texts]


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
        raise UserError(f"a message has a part of type {kind!r}; this version reads parts of type text")
    return text


def flat(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: contents in one piece."""
    return [m | {"content": told(m["content"]).words} if isinstance(_content(m), list) else m for m in messages]


def _content(message: Any) -> Any:
    """None where a message isn't one: that is the template's to refuse."""
    return message.get("content") if isinstance(message, dict) else None


def places(render: Callable[[list[dict[str, Any]]], str], messages: Sequence[dict[str, Any]], text: str) -> list[Place]:
    """Where the messages of users and tools lie in `text`, which is what `render` makes of all messages.

    They are found with marks in their places. Empty where the template doesn't write them as they are.
    """
    marked, marks = list(flat(messages)), {}
    for i, message in enumerate(messages):
        if isinstance(_content(message), str | list) and message.get("role") in _READ_BY:
            mark = secrets.token_hex(16)
            marks[mark] = told(message["content"], message["role"])
            marked[i] = message | {"content": mark}
    if not marks:
        return []
    try:
        pieces = re.split(f"({'|'.join(marks)})", render(marked))
    except UserError:  # a template that looks into the messages
        return []
    return _matched(pieces, marks, text) if pieces[1::2] == list(marks) else []


def _matched(pieces: Sequence[str], marks: dict[str, Told], text: str) -> list[Place]:
    """`pieces`: the template's own text and marks, in turn."""
    found, at = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        return []
    for mark, after in zip(pieces[1::2], pieces[2::2]):
        words, context = marks[mark].words, marks[mark].context
        lead = 0
        if not text.startswith(words + after, at):
            words, lead = words.strip(), len(words) - len(words.lstrip())
            if not text.startswith(words + after, at):
                return []
        end, middle = at + len(words), at + min(max(context - lead, 0), len(words))
        found.append(Place((at, end), (at, middle), text[middle:end]))
        at = end + len(after)
    return found if at == len(text) else []


def tokens_in(span: Range, ids: Sequence[int], length: int, encode: Callable[[int, int], Sequence[int]]) -> Range:
    """The tokens that lie wholly in a span of a text's `length` characters; `ids` are the text's.

    `encode` gives the ids of a stretch of the text. Those that the text up to the span's end has in common with all of
    it, from the start, end before the span does; from the end likewise: so no offsets are needed of any tokenizer.
    """
    lo = len(ids) - _in_common(ids[::-1], encode(span[0], length)[::-1])
    hi = _in_common(ids, encode(0, span[1]))
    return lo, max(lo, hi)


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many equal items two sequences begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
