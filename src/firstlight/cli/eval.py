"""`firstlight eval`: what a setting does to quality, beside dense on the same samples, as a table and as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.cli.inputs import numbers
from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.core.config import Options

_BESIDE = {"agreement": "KL", "perplexity": "gain kept"}
"""What a table shows beside a task's score."""


@with_flags(options=Options)
def evaluate(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    options: Options,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What to measure: agreement (with float32), perplexity (on books), niah_single_1, niah_single_2, "
            "niah_single_3 (RULER's needles, and a second question on the kept cache).",
        ),
    ] = "agreement,perplexity,niah_single_1",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.", metavar="N,N,...")] = "2048",
    samples: Annotated[
        int | None, typer.Option(help="Prompts of each task and length; default: 3 to read, 10 needles.", metavar="N")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep finished runs in this JSON lines file, and take from it those that it has."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Quality of a setting beside dense: agreement with float32, perplexity, retrieval. The prefix cache is off.

    What each figure means is in docs/metrics.md.

    firstlight eval smollm2 --tasks agreement,perplexity --lengths 2048,4096

    firstlight eval smollm2 --tasks niah_single_2 --samples 20 --method band:window=512 --out results.jsonl
    """
    import torch  # here, because it is slow to load

    from firstlight.evaluate.grid import Grid
    from firstlight.evaluate.grid import evaluate as run
    from firstlight.evaluate.machine import describe_machine

    grid = Grid([name.strip() for name in tasks.split(",")], numbers(lengths, "lengths"), samples)
    with Bars() as bars, Console(stderr=True).status("") as now:
        found = run(model, options, grid, out=out, progress=bars, tell=now.update)
        machine = describe_machine(torch.get_num_threads())
    if as_json:
        typer.echo(json.dumps({"machine": machine, **found}, indent=2))
    else:
        for shown in tables(found["rows"]):
            Console().print(shown, "")


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """For a person: a table for each task, place and length; intervals are for 95 %, also that of the difference."""
    for (task, at, length), group in itertools.groupby(rows_in_order(rows), key=_cell):
        cell = list(group)
        title = f"{task}, {at.replace('_', ' ')}, {length} tokens (n {cell[-1]['samples']})"
        shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        shown.add_column("settings", overflow="fold", min_width=11)
        for heading in ("score", "95 %", "minus dense", _BESIDE.get(task, "won, lost"), "density", "TTFT"):
            shown.add_column(heading, justify="right", no_wrap=True)
        for row in cell:
            shown.add_row(*_texts(row))
        yield shown


def rows_in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one cell together, cells as they first come."""
    first = {_cell(row): i for i, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: first[_cell(row)])


def _cell(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["at"], row["length"]


def _texts(row: dict[str, Any]) -> list[str]:
    beside = {"agreement": row["kl"], "perplexity": row.get("gain_kept")}
    less = row["against_dense"] or {}
    counts = f"{less['won']}, {less['lost']}" if "won" in less else "-"
    return [
        row["name"],
        "n/a" if "note" in row else _number(row["score"]),
        row.get("note", "").removeprefix("n/a: ") or _interval(row["low"], row["high"]),
        _difference(less),
        _number(beside[row["task"]]) if row["task"] in beside else counts,
        f"{row['density']:.2f}",
        duration(row["ttft_s"]),
    ]


def _difference(less: dict[str, Any]) -> str:
    if less.get("difference") is None:
        return "-"
    return f"{less['difference']:+.2g} ({less['low']:+.2g}, {less['high']:+.2g})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g}, {high:.3g}"
