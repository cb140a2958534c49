"""`firstlight bench ttft --against`: runs the peers, and shows an exact and a quantised table that are never mixed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from firstlight.cli.breakdown import duration
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.evaluate.machine import describe_machine
from firstlight.evaluate.peers.contest import Contest, Task
from firstlight.evaluate.peers.recipes import describe, ours, recipes, transformers
from firstlight.evaluate.speed import shipped_text
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.prompt.tokenizer import Tokenizer

_HEADINGS = (
    "engine",
    "prompt",
    "TTFT",
    "min",
    "max",
    "1st call",
    "limit",
    "of limit",
    "/ ours",
    "decode/s",
    "MB",
    "load",
    "others",
)


def contest(
    model: str,
    options: Options,
    against: Sequence[str],
    lengths: Sequence[int],
    *,
    tokens: int,
    rounds: int,
    limit_s: float,
    sweep_again: bool,
) -> dict[str, Any]:
    """`machine` and `rows` of a whole contest; what it is doing goes to stderr."""
    peers = recipes(against, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = describe_machine(torch.get_num_threads())
    status = Console(stderr=True, highlight=False)
    task = _task(model, lengths, tokens, rounds, machine, limit_s, sweep_again)
    rows = Contest(
        task,
        peers,
        lambda line: status.print(line, style="dim"),
        reference=ours("firstlight-f32", options),
        converter=transformers(),
    ).rows()
    name = Path(model).name
    return {"machine": machine, "rows": [{"model": name, **row} for row in rows]}


def _task(
    model: str,
    lengths: Sequence[int],
    tokens: int,
    rounds: int,
    machine: dict[str, Any],
    limit_s: float,
    sweep_again: bool,
) -> Task:
    path = resolve(model)
    checkpoint = open_checkpoint(path)
    context = checkpoint.config.max_context
    if max(lengths) + tokens > context:
        raise UserError(f"{max(lengths)} tokens and {tokens} after them pass the model's context of {context}")
    return Task(
        path=path,
        digest=checkpoint.digest,
        config=checkpoint.config,
        text=Tokenizer.from_source(checkpoint.tokenizer_source).encode(shipped_text()),
        lengths=lengths,
        tokens=tokens,
        rounds=rounds,
        threads=machine["threads"],
        peaks=machine["peak_gflops"],
        limit_s=limit_s,
        sweep_again=sweep_again,
    )


def append(file: Path, found: dict[str, Any]) -> None:
    """Each row as one JSON line with its machine and the time, so that a line says everything by itself."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(
                json.dumps({"date": when, **row, "machine": found["machine"]}) + "\n" for row in found["rows"]
            )
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror}); choose another file for the results") from None


def tables(found: dict[str, Any]) -> list[Table]:
    """The exact rows, then the quantised ones; a row that failed says why."""
    machine = found["machine"]
    version = machine["commit"] or machine["firstlight"]
    where = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, firstlight {version}"
    kinds = (("Exact", True), ("Quantised", False))
    return [_table(f"{kind}: {where}", [r for r in found["rows"] if r["exact"] is exact]) for kind, exact in kinds]


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in (*_HEADINGS, "agrees", "settings"):
        shown.add_column(heading, justify="left" if heading in ("engine", "settings") else "right")
    ours = {r["prompt_tokens"]: r["ttft_s"]["median"] for r in rows if r["engine"] == "firstlight" and "ttft_s" in r}
    for row in (row for row in rows if "ttft_s" in row):
        shown.add_row(*_cells(row, ours.get(row["prompt_tokens"])))
    for cells in dict.fromkeys(_reason(row) for row in rows if row["failed"]):
        shown.add_row(cells[0], cells[1], *[""] * (len(_HEADINGS) - 1), cells[2])
    return shown


def _cells(row: dict[str, Any], ours: float | None) -> list[str]:
    ttft, agreed = row["ttft_s"], row["agreement"]
    return [
        f"{row['engine']} {row['version']}",
        f"{row['prompt_tokens']}",
        *(duration(ttft[key]) for key in ("median", "min", "max")),
        duration(row["first_call_ttft_s"]),
        duration(row["limit_s"]),
        f"{row['mfu']:.0%}",
        f"{ttft['median'] / ours:.2f}" if ours else "-",
        f"{row['decode_tok_s']:.1f}" if row["decode_tok_s"] else "-",
        f"{row['rss_mb']:,.0f}",
        duration(row["load_s"]),
        f"{row['elsewhere']:.0%}",
        f"{agreed['equal']}/{agreed['of']}" if agreed else "-",
        describe(row["settings"]),
    ]


def _reason(row: dict[str, Any]) -> tuple[str, str, str]:
    """Engine, prompt and reason; many settings that fail for one reason are one line."""
    return row["engine"], f"{row['prompt_tokens'] or '-'}", f"failed: {row['failed']}"
