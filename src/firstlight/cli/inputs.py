"""What the user gave as text: the prompt, documents and standard input, joined into one prompt or chat; numbers."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from firstlight.core.errors import UserError
from firstlight.prompt.spans import as_parts

STDIN = "-"
_SILENCE_S = 1.0


def read_document(name: str) -> str:
    """The text of a file, or of standard input for `-`. Raises UserError if it can't be had or isn't UTF-8."""
    if name == STDIN:
        return _decode(read_stdin(), "standard input")
    try:
        return _decode(Path(name).read_bytes(), name)
    except OSError as error:
        raise UserError(f"can't read {name}: {error.strerror}; give a text file") from None


def read_stdin() -> bytes:
    """All of standard input. Says so on stderr when nothing comes, for that is easily taken for a hang."""
    if sys.stdin is None:
        return b""
    ready, _, _ = select.select([sys.stdin], [], [], _SILENCE_S)
    if not ready and not sys.stdin.isatty():
        typer.echo("firstlight: waiting for text on standard input (</dev/null gives none)", err=True)
    return sys.stdin.buffer.read()


def gather(prompt: str | None, documents: Sequence[str]) -> list[str]:
    """What there is to read, if anything, and last what is asked: one text each, two at most.

    Text that is piped in is the prompt, or a document if `prompt` is given. Documents without a prompt are one text.
    Raises UserError if that leaves nothing to answer.
    """
    texts, asked = [read_document(name) for name in documents], prompt
    if STDIN not in documents and not _is_terminal() and (prompt is None or _is_piped()):
        piped = _decode(read_stdin(), "standard input")
        asked, texts = (piped, texts) if prompt is None else (prompt, [*texts, piped])
    found = [text for text in (joined(texts), (asked or "").strip("\n")) if text]
    if not joined(found).strip():
        raise UserError("the prompt is empty; give -p TEXT, -f FILE or text on standard input")
    return found


def joined(texts: Sequence[str]) -> str:
    """Texts with a blank line between them; empty ones are left out."""
    return "\n\n".join(text.strip("\n") for text in texts if text.strip("\n"))


def as_prompt(texts: Sequence[str]) -> Any:
    """One text as it is, several as its parts: what is read before what is asked."""
    return texts[0] if len(texts) == 1 else as_parts(*texts)


def wants_chat(prompt: str | None, documents: Sequence[str]) -> bool:
    """Whether there is no prompt, but a person at a terminal who can be asked for one."""
    return prompt is None and STDIN not in documents and sys.stdin is not None and sys.stdin.isatty()


def as_messages(prompt: Any, system: str | None) -> list[dict[str, Any]]:
    """A chat of one user message, a text or its parts, after a system message if there is one."""
    lead = [{"role": "system", "content": system}] if system is not None else []
    return [*lead, {"role": "user", "content": prompt}]


def numbers(text: str, what: str) -> list[int]:
    """`1,4,16` -> whole numbers. Raises UserError that calls them `what`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"can't read the {what} {text!r}; write them like 512,2048") from None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        cure = "convert it first, with iconv for one"
        raise UserError(f"{name} is not UTF-8 text at byte {error.start}; {cure}") from None


def _is_terminal() -> bool:
    """Nothing to read without asking a person: a terminal, or no standard input at all."""
    return sys.stdin is None or sys.stdin.isatty()


def _is_piped() -> bool:
    """A pipe or a file; what else may stand there when nobody redirects it (a socket, /dev/null) is not read."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
