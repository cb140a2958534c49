"""`firstlight bench throughput`: tokens a second with many requests at once, and the gain over one at a time."""

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
from firstlight.core.config import Options


@with_flags(options=Options)
def throughput(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    options: Options,
    batch: Annotated[str, typer.Option(help="Requests under way at once.", metavar="N,N,...")] = "1,4,16",
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths in tokens; with several, requests take them in turn.", metavar="N,N,...")
    ] = "512",
    tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.", metavar="N")] = 128,
    repeat: Annotated[
        int, typer.Option("--repeat", metavar="N", help="Measurements of each batch, after one warm-up.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Tokens a second with many requests at once, and the gain over one at a time.

    The prefix cache is off, --max-num-seqs is the largest batch, and --max-model-len what the longest request needs.

    firstlight bench throughput smollm2 --batch 1,4,16 --prompt-tokens 512 --tokens 128

    firstlight bench throughput smollm2 --batch 8 --prompt-tokens 128,512,2048
    """
    batches, lengths = numbers(batch, "batch sizes"), numbers(prompt_tokens, "lengths")
    import torch  # here, because it is slow to load

    from firstlight.evaluate.machine import describe_machine
    from firstlight.evaluate.throughput import check, measure
    from firstlight.llm import LLM

    check(batches, lengths, tokens, repeat)
    fitted = replace(
        options,
        prefix_cache="off",
        max_num_seqs=max(batches),
        max_model_len=options.max_model_len or max(lengths) + tokens,
    )
    settings = {field.name: getattr(fitted, field.name) for field in fields(fitted)}
    bars, status = Bars(phases=("fetch", "load")), Console(stderr=True)
    with bars, LLM(model, progress=bars, **settings) as llm, status.status("machine") as now:
        machine = describe_machine(torch.get_num_threads())
        rows = list(measure(llm, batches, lengths, num_new=tokens, repeat=repeat, tell=now.update))
    if as_json:
        typer.echo(json.dumps({"machine": machine, "rows": rows}, indent=2))
    else:
        Console().print(table(machine, rows))


def table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """The rows for a person: how long a run takes, then tokens a second: prompts', decoded ones, new ones, all."""
    title = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
    shown = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in ("at once", "run", "min", "max", "prefill/s", "decode/s", "new/s", "all/s", "gain"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speeds = (row[key] for key in ("prefill_tok_s", "decode_tok_s", "new_tok_s", "total_tok_s"))
        shown.add_row(
            f"{row['batch']}",
            *(duration(row["wall_s"][key]) for key in ("median", "min", "max")),
            *(f"{speed:,.1f}" for speed in speeds),
            f"{row['gain']:.2f}x",
        )
    return shown
