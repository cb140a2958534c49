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

_BESIDE = {"agreement": "KL", "perplexity": "gain kept", "context_gain": "PPL", "recall": "error"}
"""What a table shows beside a task's score."""


@with_flags(options=Options)
def evaluate(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    options: Options,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What to measure: agreement (with float32), perplexity and context_gain (on books), recall (what a "
            "planner leaves out, layer by layer), or retrieval by "
            "RULER's names (niah_single_1..3, niah_multikey_1..3, niah_multivalue, niah_multiquery, vt, cwe, fwe, "
            "qa_1, qa_2) and lost_in_the_middle.",
        ),
    ] = "agreement,perplexity,niah_single_1",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.", metavar="N,N,...")] = "2048",
    samples: Annotated[
        int | None, typer.Option(help="Prompts of each task and length; default: 3 to read, 10 to search.", metavar="N")
    ] = None,
    placements: Annotated[
        str,
        typer.Option(
            metavar="last,first,tail",
            help="Where questions stand: last (and a second one after it, on the same cache), first (before the text "
            "only), tail (last, after a filler).",
        ),
    ] = "last",
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING",
            help="Another setting on the same samples (repeatable): methods and a precision, joined by ' + '.",
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Beside each method: dense in f32 and int8, band at its density, truncate and bm25 at its cost.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep finished runs in this JSON lines file, and take from it those that it has."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Quality of settings beside dense: agreement with float32, perplexity, retrieval. The prefix cache is off.

    What each figure means is in docs/metrics.md.

    firstlight eval smollm2 --tasks agreement,perplexity --lengths 2048,4096

    firstlight eval smollm2 --tasks niah_single_2 --samples 20 --method band:window=512 --out results.jsonl

    firstlight eval smollm2 --tasks vt,qa_2 --method lazyllm --against "band:window=512 + int8" --controls
    """
    import torch  # here, because it is slow to load

    from firstlight.evaluate.grid import Grid
    from firstlight.evaluate.grid import evaluate as run
    from firstlight.evaluate.machine import describe_machine
    from firstlight.evaluate.settings import setting_of

    grid = Grid(_words(tasks), numbers(lengths, "lengths"), samples, _words(placements))
    others = [setting_of(options, text) for text in against or ()]
    with Bars() as bars, Console(stderr=True).status("") as now:
        found = run(
            model, options, grid, against=others, with_controls=controls, out=out, progress=bars, tell=now.update
        )
        machine = describe_machine(torch.get_num_threads())
    if as_json:
        typer.echo(json.dumps({"machine": machine, **found}, indent=2))
    else:
        for shown in [*tables(found["rows"]), *depth_tables(found["rows"]), *pair_table(found["paired"])]:
            Console().print(shown, "")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


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


def depth_tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """For a person: the score in each fifth of the text, where the answer lies in one place."""
    for (task, at, length), group in itertools.groupby(rows_in_order(rows), key=_cell):
        cell = [row for row in group if row.get("depths")]
        if cell:
            shown = Table(title=f"{task} by depth, {at}, {length} tokens", title_justify="left", box=None)
            shown.add_column("settings", overflow="fold", min_width=11)
            for part in cell[0]["depths"]:
                shown.add_column(f"{100 * part['from']:.0f}-{100 * part['to']:.0f} %", justify="right", no_wrap=True)
            for row in cell:
                shown.add_row(row["name"], *(_number(part["score"]) for part in row["depths"]))
            yield shown


def pair_table(paired: list[dict[str, Any]]) -> Iterator[Table]:
    """For a person: all retrieval together, sample by sample beside dense."""
    if paired:
        shown = Table(title="All retrieval, paired with dense (n/a left out)", title_justify="left", box=None)
        shown.add_column("settings", overflow="fold", min_width=11)
        for heading in ("tokens", "samples", "won", "lost", "net", "p"):
            shown.add_column(heading, justify="right")
        for row in paired:
            counts = [str(row[key]) for key in ("length", "samples", "won", "lost", "net")]
            shown.add_row(row["name"], *counts, _number(row["p"]))
        yield shown


def rows_in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one cell together, cells as they first come."""
    first = {_cell(row): i for i, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: first[_cell(row)])


def _cell(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["at"], row["length"]


def _texts(row: dict[str, Any]) -> list[str]:
    beside = {"agreement": row["kl"], "perplexity": row.get("gain_kept"), "context_gain": row.get("perplexity")}
    beside["recall"] = row.get("error")
    less = row["against_dense"] or {}
    counts = f"{less['won']}, {less['lost']}" if "won" in less else "-"
    return [
        row["name"],
        "n/a" if "note" in row else _number(row["score"]),
        row.get("note", "").removeprefix("n/a: ") or _interval(row["low"], row["high"]),
        _difference(less),
        _number(beside[row["task"]]) if row["task"] in beside else counts,
        f"{row['density']:.2f}",
        "-" if row["ttft_s"] is None else duration(row["ttft_s"]),
    ]


def _difference(less: dict[str, Any]) -> str:
    if less.get("difference") is None:
        return "-"
    return f"{less['difference']:+.2g} ({less['low']:+.2g}, {less['high']:+.2g})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g}, {high:.3g}"
