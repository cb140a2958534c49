"""`firstlight bench`: speeds on this machine, as tables and as JSON: our engine, its peers, and the machine's limit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.cli.inputs import numbers
from firstlight.cli.itl import itl
from firstlight.cli.load import load
from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.cli.throughput import throughput
from firstlight.core.config import Options
from firstlight.core.errors import UserError

app = typer.Typer(
    help="Measure time to first token, decode speed, throughput, and what this machine could do.", no_args_is_help=True
)

_WIDE = 200
"""Columns of a table that goes to a file or a pipe: there nothing needs to be cut."""

_Model = Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")]
_Repeat = Annotated[int, typer.Option("--repeat", metavar="N", help="Measurements of each length, after one warm-up.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]


@app.command()
@with_flags(options=Options)
def ttft(
    model: _Model,
    options: Options,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths in tokens.", metavar="N,N,...")] = "512,2048,8000",
    tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.", metavar="N")] = 8,
    repeat: _Repeat = 5,
    as_json: _Json = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Engines to measure in the same run, each at its best: llama.cpp, openvino, vllm, transformers, "
            "firstlight-deterministic, firstlight-f32. They are installed under the cache directory on first use.",
            metavar="NAME,NAME,...",
        ),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="With --against: append each row to this file as a JSON line.", metavar="FILE")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="With --against: the longest that one process may take.", metavar="SECONDS")
    ] = 600.0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="With --against: look for each peer's best settings again.")
    ] = False,
) -> None:
    """Time to first token at some prompt lengths, of one request alone.

    The prefix cache is off and --max-num-seqs is 1, whatever is given.

    firstlight bench ttft smollm2 --prompt-tokens 512,2048 --repeat 5
    """
    lengths = numbers(prompt_tokens, "lengths")
    if against is None:
        if results or sweep:
            raise UserError(
                f"{'--results' if results else '--sweep'} is for runs beside other engines; name some with --against"
            )
        _bench(model, options, lengths, tokens, repeat, as_json)
        return
    from firstlight.evaluate.speed import check

    check(lengths, repeat, tokens)
    names = [name.strip() for name in against.split(",") if name.strip()]
    from firstlight.cli.contest import append, contest, tables

    found = contest(model, options, names, lengths, tokens=tokens, rounds=repeat, limit_s=time_limit, sweep_again=sweep)
    if results:
        append(results, found)
    _show(found, tables(found), as_json)


@app.command()
@with_flags(options=Options)
def decode(
    model: _Model,
    options: Options,
    context: Annotated[str, typer.Option(help="Prompt lengths in tokens.", metavar="N,N,...")] = "512,8000",
    tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.", metavar="N")] = 64,
    repeat: _Repeat = 3,
    as_json: _Json = False,
) -> None:
    """Decode speed after contexts of some lengths, of one request alone.

    The prefix cache is off and --max-num-seqs is 1, whatever is given.

    firstlight bench decode smollm2 --context 512,8000 --tokens 64
    """
    if tokens < 2:
        raise UserError(f"tokens={tokens} leaves no time between tokens to measure; give 2 or more")
    _bench(model, options, numbers(context, "lengths"), tokens, repeat, as_json)


app.command()(throughput)
app.command()(load)
app.command()(itl)


@app.command()
def peak(as_json: _Json = False) -> None:
    """What this machine can do at most: products in each type, and memory read, on one thread and on all.

    firstlight bench peak
    """
    from firstlight.evaluate.machine import describe_processor
    from firstlight.evaluate.peak import measure_peaks

    machine = describe_processor()
    rows = measure_peaks(sorted({1, len(os.sched_getaffinity(0))}))
    _show({"machine": machine, "rows": rows}, [_peaks(machine, rows)], as_json)


@app.command()
def kernel(
    model: _Model = "smollm2",
    rows: Annotated[str, typer.Option(help="Rows that linears and row operators get.", metavar="N,N,...")] = "1,16,512",
    context: Annotated[int, typer.Option(help="Tokens that attention reads.", metavar="N")] = 2048,
    as_json: _Json = False,
) -> None:
    """Each operator of a model by itself, beside PyTorch's and the time that this machine needs at least.

    Weights are random: only shapes are the model's, and the types of blocks that --weights compact reads.

    Operands come from memory, not from a cache. A dash: PyTorch has no such operator.

    firstlight bench kernel smollm2 --rows 1,512
    """
    counts = numbers(rows, "numbers of rows")
    import torch  # here, because it is slow to load

    from firstlight.evaluate.machine import describe_processor
    from firstlight.evaluate.operators import measure_operators
    from firstlight.evaluate.peak import measure_peaks
    from firstlight.models.weights.checkpoint import open_checkpoint
    from firstlight.models.weights.hub import resolve

    checkpoint = open_checkpoint(resolve(model))
    peaks = {row["what"]: row["steady"] for row in measure_peaks([torch.get_num_threads()])}
    found = list(measure_operators(checkpoint.config, counts, context, peaks, checkpoint.types))
    machine = describe_processor() | {"threads": torch.get_num_threads()}
    _show({"machine": machine, "peaks": peaks, "rows": found}, [_operators(machine, found)], as_json)


def _bench(model: str, options: Options, lengths: list[int], tokens: int, repeat: int, as_json: bool) -> None:
    import torch  # here, because it is slow to load

    from firstlight.evaluate.machine import describe_machine
    from firstlight.evaluate.speed import measure
    from firstlight.llm import LLM

    status = Console(stderr=True)
    bars = Bars(phases=("fetch", "load"))
    with bars, LLM(model, progress=bars, **_settings(options)) as llm, status.status("machine") as now:
        machine = describe_machine(torch.get_num_threads())
        peak = machine["peak_gflops"][options.precision.partition(":")[0]]
        rows = list(measure(llm, lengths, num_decode=tokens, repeat=repeat, peak_gflops=peak, tell=now.update))
    _show({"machine": machine, "rows": rows}, [table(machine, rows)], as_json)


def _show(found: dict[str, Any], shown: Sequence[Table], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDE).print(*shown)


def _peaks(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    title = (
        f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores; kernels of this process: {machine['kernels']}"
    )
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("what", "threads", "steady", "first call", "unit", "operator"):
        shown.add_column(heading, justify="left" if heading in ("what", "unit", "operator") else "right")
    for row in rows:
        rates = (f"{row[key]:,.1f}" for key in ("steady", "first_call"))
        shown.add_row(row["what"], f"{row['threads']}", *rates, row["unit"], row["operator"])
    return shown


def _operators(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    title = f"{machine['cpu']}, {machine['threads']} threads; kernels of this process: {machine['kernels']}"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("operator", "shape", "type", "rows", "ours", "PyTorch", "times faster", "limit", "of the limit"):
        shown.add_column(heading, justify="left" if heading in ("operator", "shape", "type") else "right")
    for row in rows:
        ours, theirs, limit = (row[key] for key in ("seconds", "torch_s", "limit_s"))
        beside = ("-", "-") if theirs is None else (_micros(theirs), f"{theirs / ours:.1f}")
        kind = f"{row['precision']} from {row['blocks']}" if row["blocks"] else row["precision"]
        names = (row["operator"], row["shape"], kind, f"{row['rows']}")
        shown.add_row(*names, _micros(ours), *beside, _micros(limit), f"{limit / ours:.0%}")
    return shown


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """The rows for a person; TTFT is the median, with its extremes beside it."""
    title = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
    shown = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in ("prompt", "TTFT", "min", "max", "1st call", "limit", "tok/s", "MFU", "decode/s", "MB"):
        shown.add_column(heading, justify="right")
    for row in rows:
        ttft_s = row["ttft_s"]
        shown.add_row(
            f"{row['prompt_tokens']}",
            *(duration(ttft_s[key]) for key in ("median", "min", "max")),
            duration(row["first_call_ttft_s"]),
            duration(row["limit_s"]),
            f"{row['prefill_tok_s']:,.0f}",
            f"{row['mfu']:.0%}",
            f"{row['decode_tok_s']:.1f}" if row["decode_tok_s"] else "-",
            f"{row['rss_mb']:,.0f}",
        )
    return shown


def _settings(options: Options) -> dict[str, Any]:
    """The engine's keywords: one request at a time, and nothing known beforehand."""
    alone = replace(options, prefix_cache="off", max_num_seqs=1)
    return {field.name: getattr(alone, field.name) for field in fields(alone)}
