"""`firstlight bench load`: from the start of a process to its first token, and the memory that this takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.cli.options import with_flags
from firstlight.core.config import Options
from firstlight.core.errors import UserError

_WIDE = 120
"""Columns of a table that goes to a file or a pipe."""


@with_flags(options=Options)
def load(
    model: Annotated[list[str], typer.Argument(help="Names of `firstlight models list`, or paths.")],
    options: Options,
    against: Annotated[
        str, typer.Option(help="Engines to start beside ours: llama.cpp, transformers.", metavar="NAME,NAME,...")
    ] = "",
    repeat: Annotated[int, typer.Option("--repeat", metavar="N", help="Starts of each engine.")] = 3,
    time_limit: Annotated[
        float, typer.Option(help="The longest that one process may take.", metavar="SECONDS")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """From the start of a process to its first token: with an empty cache, and as ever after.

    The prompt has ten tokens; memory is the most that the process held. Imports: from the start of the process until
    Python has the engine's packages. Load: until it takes prompts, the
    same imports included.

    firstlight bench load smollm2 gemma3 --against llama.cpp,transformers
    """
    import torch  # here, because it is slow to load

    from firstlight.evaluate.machine import describe_processor
    from firstlight.evaluate.peers.starts import measure
    from firstlight.evaluate.speed import shipped_text
    from firstlight.models.weights.checkpoint import open_checkpoint
    from firstlight.models.weights.hub import resolve
    from firstlight.prompt.tokenizer import Tokenizer

    if repeat < 1:
        raise UserError(f"repeat={repeat} measures nothing; give 1 or more")
    names = [name.strip() for name in against.split(",") if name.strip()]
    threads = options.threads or torch.get_num_threads()
    status = Console(stderr=True, highlight=False)
    found: dict[str, Any] = {"machine": {**describe_processor(), "threads": threads}, "rows": []}
    for name in model:
        path = resolve(name)
        text = Tokenizer.from_source(open_checkpoint(path).tokenizer_source).encode(shipped_text())
        rows = measure(
            path,
            text,
            options,
            names,
            threads=threads,
            repeat=repeat,
            limit_s=time_limit,
            tell=lambda line: status.print(line, style="dim"),
        )
        found["rows"] += [{"model": Path(name).name, **row} for row in rows]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDE).print(_table(found))


def _table(found: dict[str, Any]) -> Table:
    machine = found["machine"]
    title = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("model", "engine", "start", "imports", "load", "first token", "min", "max", "MB", "others"):
        shown.add_column(heading, justify="left" if heading in ("model", "engine", "start") else "right")
    for row in found["rows"]:
        if "load_s" in row:
            first = row["first_token_s"]
            parts = [row[key]["median"] for key in ("imported_s", "load_s")]
            times = [*parts, *(first[key] for key in ("median", "min", "max"))]
            last = [*map(duration, times), f"{row['rss_mb']:,.0f}", f"{row['elsewhere']:.0%}"]
            shown.add_row(row["model"], f"{row['engine']} {row['version']}", row["state"], *last)
        else:
            shown.add_row(row["model"], row["engine"], row["state"], f"failed: {row['failed']}")
    return shown
