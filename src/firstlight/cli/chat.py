"""`firstlight run MODEL` without a prompt, on a terminal: a chat, in which each turn finds the earlier ones' cells.

A turn's prompt is the whole conversation under the model's template. Its beginning was computed in the turns before,
so the prefix cache holds it: `/stats` says how much.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.cli.inputs import as_messages, as_prompt, joined, read_document
from firstlight.cli.progress import Bars
from firstlight.cli.run import conclude, print_stream
from firstlight.core.config import Options, format_bytes
from firstlight.core.errors import UserError
from firstlight.core.request import SamplingParams

if TYPE_CHECKING:
    from firstlight.llm import LLM

_HISTORY_LINES = 1000
_HELP = {
    "/file PATH": "put a text file before your next message",
    "/stats": "tokens so far, how many came from the cache, and how fast it was",
    "/reset": "begin a new conversation; the system message stays",
    "/help": "this list",
    "/exit": "leave; so does Ctrl-D",
    "Ctrl-C": "stop the answer; what was said of it stays in the conversation",
}


def chat(model: str, documents: Sequence[str], system: str | None, sampling: SamplingParams, options: Options) -> None:
    """Talk until the person leaves. The documents go before the first message."""
    if sampling.n > 1:
        raise UserError(f"n={sampling.n}: a chat goes on from one answer; leave it out, or give -p TEXT")
    texts = [read_document(name) for name in documents]
    from firstlight import LLM  # here, because it brings torch
    from firstlight.core.files import cache_dir

    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    with Bars() as bars, LLM(model, progress=bars, **settings) as llm:
        llm.encode_chat(as_messages("hello", system))  # a model that can't chat says so before anybody has typed
        with line_editing(cache_dir() / "chat-history"):
            Chat(llm, bars, sampling, system, texts).talk()


@contextlib.contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Arrow keys and file names on Tab for `input`, and the lines of earlier sessions, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("tab: complete")
    readline.set_completer_delims(" ")
    readline.set_history_length(_HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)  # what people ask is nobody else's business
            readline.write_history_file(history)


class Chat:
    """A conversation: the messages so far, the documents that wait for the next one, a report for each answer."""

    def __init__(
        self, llm: LLM, bars: Bars, sampling: SamplingParams, system: str | None, documents: Sequence[str]
    ) -> None:
        self._llm, self._bars, self._sampling = llm, bars, sampling
        self._lead = as_messages("", system)[:-1]
        self._messages: list[dict[str, Any]] = list(self._lead)
        self._documents = list(documents)
        self._reports: list[dict[str, Any]] = []
        self._commands = {"/file": self._file, "/stats": self._stats, "/reset": self._reset, "/help": self._help}
        self._console = Console(stderr=True)

    def talk(self) -> None:
        """Until Ctrl-D or `/exit`. No mistake and no Ctrl-C ends it."""
        limit = self._llm.engine.limits.max_model_len
        _say(f"{self._llm.model_name}, context {limit:,} tokens; /help lists commands, Ctrl-D leaves")
        while True:
            try:
                line = _line()
                if line == "/exit":
                    return
                self._obey(line)
            except EOFError:
                typer.echo(err=True)
                return
            except KeyboardInterrupt:
                typer.echo(err=True)
                _say("Ctrl-D or /exit leaves")
            except UserError as error:
                _say(str(error))

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/") and name[1:].isalpha():
            raise UserError(f"no command is called {name}; /help lists them")
        elif line:
            self._answer(line)

    def _answer(self, text: str) -> None:
        messages = [*self._messages, *as_messages(as_prompt([t for t in (joined(self._documents), text) if t]), None)]
        said: list[str] = []
        report: dict[str, Any] | None = None
        try:
            stream: Any = self._llm.stream(messages, self._sampling)
            with contextlib.closing(stream):
                report = print_stream(_overheard(stream, said), self._bars, quiet=False).report
        except KeyboardInterrupt:
            self._bars.close()
            typer.echo()
        except UserError as error:
            self._documents.clear()
            raise UserError(f"{error}. Nothing was added; /reset begins a new conversation") from None
        if report is None and not any(said):
            _say("stopped before the first token; nothing was added")
            return
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        self._documents.clear()
        self._finish(report)

    def _finish(self, report: dict[str, Any] | None) -> None:
        """The breakdown of a whole answer, and why it ended where the model would have gone on."""
        if report is None:
            _say("stopped; what was said stays in the conversation")
            return
        self._reports.append(report)
        conclude(report, as_json=False)
        if report["finish_reason"] == "length":
            full = report["completion_tokens"] < self._sampling.max_tokens
            cure = "the context is full: /reset begins a new conversation" if full else "--max-tokens allows more"
            _say(f"cut after {report['completion_tokens']} tokens; {cure}")

    def _file(self, name: str) -> None:
        path = os.path.abspath(os.path.expanduser(name.strip("\"'")))  # noqa: PTH100, PTH111 - `-` is a file here too
        if not name:
            raise UserError("/file needs the path of a text file")
        self._documents.append(read_document(path))
        _say(f"{path}: {len(self._documents[-1]):,} characters go before your next message")

    def _reset(self, _: str) -> None:
        self._messages, self._reports = list(self._lead), []
        self._documents.clear()
        _say("a new conversation")

    def _help(self, _: str) -> None:
        self._print(_HELP.items())

    def _stats(self, _: str) -> None:
        if not self._reports:
            raise UserError("nothing was answered yet")
        self._print(stats(self._reports, self._llm.engine.limits.max_model_len))

    def _print(self, rows: Any) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*row)
        self._console.print(table)


def _line() -> str:
    """What the person types next. Raises EOFError at Ctrl-D, UserError if it isn't text."""
    try:
        line = input("> ").strip()
        line.encode()  # in some locales Python keeps wrong bytes as half characters
    except UnicodeError:
        raise UserError("that was not UTF-8 text; check the terminal's encoding") from None
    return line


def stats(reports: Sequence[dict[str, Any]], limit: int) -> list[tuple[str, str]]:
    """What `/stats` shows of a conversation's reports: label and text."""
    last = reports[-1]
    used = last["prompt_tokens"] + last["completion_tokens"]
    prompts, cached, answered = (
        sum(report[key] for report in reports) for key in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    speed = f"{1 / last['tpot_s']:.1f} tokens/s after it" if last["tpot_s"] else "one token"
    return [
        ("answers", f"{len(reports)}, {answered:,} tokens"),
        ("context", f"{used:,} of {limit:,} tokens, KV {format_bytes(last['kv']['bytes_peak'])}"),
        ("last prompt", _cached(last["prompt_tokens"], last["cached_tokens"])),
        ("all prompts", _cached(prompts, cached)),
        ("first token", f"{duration(last['ttft_s'])}, {speed}"),
    ]


def _cached(tokens: int, cached: int) -> str:
    return f"{tokens:,} tokens, {cached:,} from the cache ({cached / tokens:.0%})"


def _overheard(stream: Iterable[Any], said: list[str]) -> Iterator[Any]:
    """The stream; what it says is kept in `said`, also if it is never heard to its end."""
    for chunk in stream:
        said.append(chunk.text)
        yield chunk


def _say(text: str) -> None:
    typer.echo(f"firstlight: {text}", err=True)
