"""`firstlight`: finds the verb, runs it, and turns what went wrong into one line and an exit code.

A verb is imported when it is called, so that `firstlight --help` answers before torch could even load.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TextIO

import typer
from typer.completion import shell_complete
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from firstlight import __version__
from firstlight.cli.planned import not_built
from firstlight.core.errors import UserError

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
_COMPLETE = "_FIRSTLIGHT_COMPLETE"
"""Set by the shell when it wants to know how a line goes on."""


class Verb(NamedTuple):
    """Where a verb lives (`module:app` or `module:function`) and what it does."""

    target: str
    summary: str


VERBS = {
    "run": Verb("firstlight.cli.run:run", "Answer a prompt, with documents before it, or chat."),
    "prefill": Verb("firstlight.cli.prefill:prefill", "Prefill a document once, to ask about it often."),
    "bench": Verb("firstlight.cli.bench:app", "Measure time to first token, decode speed and throughput."),
    "eval": Verb("firstlight.cli.eval:evaluate", "Measure what a setting does to quality."),
    "inspect": Verb("firstlight.cli.inspect:inspect", "Pictures of one prefill: what was read, where the time went."),
    "calibrate": Verb("firstlight.cli.calibrate:calibrate", "Find what a method has to know of a model."),
    "models": Verb("firstlight.cli.models:app", "List, fetch and describe models."),
    "methods": Verb("firstlight.cli.methods:app", "List and describe methods and schedules."),
    "simulate": Verb("firstlight.cli.simulate:simulate", "Replay the event log of a run."),
}


def load(name: str) -> Any:
    """The verb's command: a `TyperCommand`, or a `TyperGroup` where the verb has verbs of its own."""
    module, _, attribute = VERBS[name].target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    home = typer.Typer(add_completion=False)
    home.callback()(lambda: None)  # makes it a group, however few verbs it has
    if isinstance(found, typer.Typer):
        home.add_typer(found, name=name)
    else:
        home.command(name)(found)
    group: Any = typer.main.get_command(home)
    return group.commands[name]


class Verbs(TyperGroup):
    """The verbs by name; the list and its one-line texts cost no import."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that is enough for `firstlight --help`."""
        return TyperCommand(cmd_name, help=VERBS[cmd_name].summary) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else stand_in, rest


app = typer.Typer(cls=Verbs, rich_markup_mode="rich")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"firstlight {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def firstlight(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """An LLM engine built around prefill: the first token of a long prompt, sooner, and right.

    [bold]firstlight run smollm2 -p "Why is the sky blue?"[/bold]

    [bold]firstlight run smollm2 -f report.txt -p "What does it cost?"[/bold]

    [bold]firstlight run smollm2[/bold]   a chat

    Every verb has examples too: [bold]firstlight run --help[/bold]
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """The program: runs the command line and exits."""
    # Some callers close our streams: then Python has none, and what we print goes nowhere.
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if instruction := os.environ.get(_COMPLETE):
        sys.exit(shell_complete(typer.main.get_command(app), {}, "firstlight", _COMPLETE, instruction))
    sys.exit(call(sys.argv[1:]))


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - held until the process ends


def call(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
    try:
        return _invoke(arguments)
    except UserError as error:
        return _complain(str(error))
    except TyperException as error:
        return _complain(_refusal(error))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away. Python flushes stdout once more at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _invoke(arguments: Sequence[str]) -> int:
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("firstlight", list(arguments)) as ctx:
            command.invoke(ctx)
        sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    return 0


def _refusal(error: TyperException) -> str:
    """What typer has against a command line, and where to read on. Empty if it has already printed its help."""
    text, where = error.format_message().rstrip("."), getattr(getattr(error, "ctx", None), "command_path", None)
    return not_built(text, where or "") or (f"{text}; see {where} --help" if text and where else text)


def _complain(text: str) -> int:
    """One line on stderr."""
    if text:
        typer.echo(f"firstlight: error: {' '.join(text.split()).rstrip('.')}", err=True)
    return USER_ERROR
