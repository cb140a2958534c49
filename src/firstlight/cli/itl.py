"""`firstlight bench itl`: what a long prompt does to running streams and to urgent requests, schedule by schedule."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.cli.options import complete_with, with_flags
from firstlight.cli.progress import Bars
from firstlight.core import registry
from firstlight.core.config import Options
from firstlight.core.errors import UserError

COMPARED = (
    *(f"sarathi:token_budget={budget}" for budget in (256, 512, 2048)),
    "layered",
    *(f"flowprefill:decode_every_ms={every}" for every in (50, 100)),
)
"""What is measured if nothing is named."""
_WIDE = 160
"""Columns of a table that goes to a file or a pipe: there nothing needs to be cut."""


@with_flags(without=("schedule",), options=Options)
def itl(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    options: Options,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="A schedule to measure (repeatable). Without it: sarathi at budgets of 256, 512 and 2048 tokens, "
            "layered, and flowprefill with a decode step each 50 and 100 ms.",
            metavar="NAME:key=value",
            autocompletion=complete_with(lambda: registry.names(schedules=True)),
        ),
    ] = None,
    streams: Annotated[int, typer.Option(help="Requests that are running when the long prompt comes.")] = 4,
    stream_tokens: Annotated[int, typer.Option(help="Their prompts' length in tokens.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="The long prompt's length in tokens.")] = 8000,
    repeat: Annotated[int, typer.Option(help="Measurements beside the streams, after a warm-up.")] = 3,
    urgent: Annotated[
        int,
        typer.Option(help="Also let so many urgent requests come at random moments of a running prefill."),
    ] = 0,
    urgent_tokens: Annotated[int, typer.Option(help="Their prompts' length in tokens.")] = 256,
    results: Annotated[
        Path | None, typer.Option(help="Append each row to this file as a JSON line.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Inter-token latency of running streams while a long prompt comes, and its time to first token.

    Only gaps that overlap the prefill count. With --urgent also: what short urgent requests wait beyond their own time
    when they come in the middle of a prefill. The prefix cache is off, and --max-num-seqs what it takes.

    firstlight bench itl smollm2 --schedule sarathi:token_budget=512 --schedule flowprefill

    firstlight bench itl smollm2 --urgent 50 --results itl.jsonl
    """
    from firstlight.evaluate.itl import Scene  # here, because it is slow to load

    scene = Scene(streams, stream_tokens, prompt_tokens, repeat, urgent, urgent_tokens, options.seed)
    compared = [replace(_fitted(options, scene), schedule=text) for text in schedule or COMPARED]
    _check(compared)
    machine, rows = _measured(model, compared, scene)
    found = {"machine": machine, "rows": rows}
    if results:
        from firstlight.cli.contest import append

        append(results, found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDE).print(table(machine, rows))


def _measured(model: str, compared: Sequence[Options], scene: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine, and a row for each schedule: a fresh engine each, one after the other."""
    import torch

    from firstlight.evaluate.itl import measure
    from firstlight.evaluate.machine import describe_machine
    from firstlight.llm import LLM

    bars, status = Bars(phases=("fetch", "load")), Console(stderr=True)
    machine: dict[str, Any] = {}
    rows = []
    for number, options in enumerate(compared, start=1):
        settings = {field.name: getattr(options, field.name) for field in fields(options)}
        lead = f"{options.schedule} ({number} of {len(compared)}): "
        with bars, LLM(model, progress=bars, **settings) as llm, status.status(f"{lead}machine") as now:
            machine = machine or describe_machine(torch.get_num_threads())
            row = measure(llm, scene, tell=lambda text, lead=lead: now.update(lead + text))  # type: ignore[misc]
            rows.append({"model": Path(model).name, **row})
    return machine, rows


def _fitted(options: Options, scene: Any) -> Options:
    """Room for all that is under way at once, and for streams that outlast the prefill."""
    return replace(
        options,
        prefix_cache="off",
        max_num_seqs=scene.streams + 2,
        max_model_len=options.max_model_len or max(scene.prompt_tokens, scene.stream_tokens + 2048) + 1,
    )


def _check(compared: Sequence[Options]) -> None:
    """A wrong name or setting is found before hours of measuring, not after."""
    from firstlight.core.registry import Method, configure

    for options in compared:
        method = Method.parse(str(options.schedule))
        cls = registry.classes(method.name, schedules=True)["schedule"]
        configure(cls, method, {field.name for field in fields(cls.Config)})
    if len({str(options.schedule) for options in compared}) < len(compared):
        raise UserError("a schedule is named twice; name each once")


def table(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """For a person: whose TTFT and p99 no other beats in both is on the front, and has a star."""
    from firstlight.evaluate.itl import front

    title = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    shown.add_column("schedule", no_wrap=True)
    for heading in ("TTFT", "alone", "ITL p50", "p99", "max", "alone", "gaps", "front", "urgent p50", "p95", "own"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row, is_best in zip(rows, front(rows)):
        gaps, urgent = row["itl_s"], row["urgent"]
        late = [f"+{1000 * urgent['over_s'][key]:.0f} ms" for key in ("p50", "p95")] if urgent else ["-", "-"]
        shown.add_row(
            str(row["schedule"]),
            duration(row["ttft_s"]["median"]),
            duration(row["ttft_alone_s"]),
            *(duration(gaps[key]) for key in ("p50", "p99", "max")),
            duration(row["itl_alone_s"]["p50"]),
            f"{gaps['count']}",
            "*" if is_best else "",
            *late,
            duration(urgent["own_s"]) if urgent else "-",
        )
    return shown
