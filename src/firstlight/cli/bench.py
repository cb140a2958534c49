"""`firstlight bench`: the speed of our own engine on this machine, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.cli.inputs import numbers
from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.cli.throughput import throughput
from firstlight.core.config import Options
from firstlight.core.errors import UserError

app = typer.Typer(help="Measure time to first token, decode speed and throughput of this engine.", no_args_is_help=True)

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
) -> None:
    """Time to first token at some prompt lengths, of one request alone.

    The prefix cache is off and --max-num-seqs is 1, whatever is given.

    firstlight bench ttft smollm2 --prompt-tokens 512,2048 --repeat 5
    """
    _bench(model, options, numbers(prompt_tokens, "lengths"), tokens, repeat, as_json)


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


def _bench(model: str, options: Options, lengths: list[int], tokens: int, repeat: int, as_json: bool) -> None:
    import torch  # here, because it is slow to load

    from firstlight.evaluate.machine import describe_machine
    from firstlight.evaluate.speed import measure
    from firstlight.llm import LLM

    status = Console(stderr=True)
    bars = Bars(phases=("fetch", "load"))
    with bars, LLM(model, progress=bars, **_settings(options)) as llm, status.status("machine") as now:
        machine = describe_machine(torch.get_num_threads())
        peak = machine["peak_gflops"][options.precision]
        rows = list(measure(llm, lengths, num_decode=tokens, repeat=repeat, peak_gflops=peak, tell=now.update))
    if as_json:
        typer.echo(json.dumps({"machine": machine, "rows": rows}, indent=2))
    else:
        Console().print(table(machine, rows))


def table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """The rows for a person; TTFT is the median, with its extremes beside it."""
    title = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
    shown = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in ("prompt", "TTFT", "min", "max", "1st call", "tok/s", "MFU", "decode/s", "MB"):
        shown.add_column(heading, justify="right")
    for row in rows:
        ttft_s = row["ttft_s"]
        shown.add_row(
            f"{row['prompt_tokens']}",
            *(duration(ttft_s[key]) for key in ("median", "min", "max")),
            duration(row["first_call_ttft_s"]),
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
