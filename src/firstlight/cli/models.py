"""`firstlight models`: which models are here, fetching one by name, and what a model file holds before it is run."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from firstlight.cache.windows import Windows
from firstlight.cli.progress import Bars
from firstlight.core.files import cache_dir
from firstlight.kernels.kv_layout import BLOCK
from firstlight.models.config import ModelConfig
from firstlight.models.weights import hub
from firstlight.models.weights.checkpoint import Checkpoint, open_checkpoint
from firstlight.models.weights.known import KNOWN, known_file
from firstlight.models.weights.store import cache_bound, cache_size

app = typer.Typer(help="List, fetch and describe models.", no_args_is_help=True)
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


@app.command("list")
def list_models(as_json: _Json = False) -> None:
    """Known models, which of them are on this machine, and the cache of packed weights.

    firstlight models list
    """
    report = _inventory()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    table = Table("name", "model", "size", "path", box=None)
    for row in report["models"]:
        table.add_row(
            row["name"], row["about"], _mib(row["nbytes"]), row["path"] or f"firstlight models pull {row['name']}"
        )
    _console().print(table)
    cache = report["weight_cache"]
    typer.echo(f"packed weights: {_mib(cache['nbytes'])} of {_mib(cache['max_nbytes'])} in {cache['path']}")


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A name from `firstlight models list`.")]) -> None:
    """Show a known model's terms, fetch it, check its sha256 and print its path.

    firstlight models pull smollm2
    """
    if name in KNOWN:
        typer.echo(f"{KNOWN[name].about}\n{KNOWN[name].terms}", err=True)
    with Bars() as bars:
        path = hub.pull(name, progress=bars.shares(f"fetching {name}"))
    typer.echo(path)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A known name, a .gguf file, a directory with config.json or a hub id.")],
    as_json: _Json = False,
) -> None:
    """Architecture, shapes, types and memory of a model.

    firstlight models show smollm2
    """
    with Bars() as bars:
        path = hub.resolve(model, progress=bars.shares(f"fetching {model}"))
    report = describe(open_checkpoint(path))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    table = Table("", "", box=None, show_header=False)
    for key, value in report.items():
        table.add_row(key.replace("_", " "), _shown(key, value))
    _console().print(table)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `show` prints; sizes in bytes, resident ones as they are at run time with the default precision, bf16."""
    config, known = checkpoint.config, known_file(checkpoint.path)
    elements = {name: _product(shape) for name, shape in checkpoint.shapes.items()}
    return {
        "path": str(checkpoint.path),
        "license": checkpoint.license or (known and known.license),
        "terms": known and known.terms,
        "architecture": config.architecture,
        "parameters": sum(elements.values()),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied_head": config.tie_head,
        "rope_theta": config.rope_theta,
        "max_context": config.max_context,
        "window": config.window,
        "types": dict(Counter(checkpoint.types.values())),
        "kv_bytes_per_token": config.kv_bytes_per_token(2),
        "resident_kv_bytes_max_context": _kv_bytes(config, config.max_context),
        "resident_weights_bytes": sum(
            n * (4 if len(checkpoint.shapes[name]) == 1 else 2) for name, n in elements.items()
        ),
    }


def _inventory() -> dict[str, Any]:
    paths = {name: hub.pulled(name) for name in KNOWN}
    models = [
        {"name": name, "about": known.about, "nbytes": known.nbytes, "path": str(paths[name]) if paths[name] else None}
        for name, known in KNOWN.items()
    ]
    cache = {"path": str(cache_dir() / "weights"), "nbytes": cache_size(), "max_nbytes": cache_bound()}
    return {"models": models, "weight_cache": cache}


def _kv_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the blocks that one request of so many tokens holds at most; window layers free those behind theirs."""
    windows = Windows.of(config.windows, config.num_kv_heads, cached=True)
    dense = -(-tokens // BLOCK) * config.num_layers * config.num_kv_heads
    blocks = windows.promise(tokens, tokens) if windows else dense
    return blocks * BLOCK * config.kv_bytes_per_token(2) // (config.num_layers * config.num_kv_heads)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _console() -> Console:
    # Wide and plain when it is not a terminal, so that paths are never cut.
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _shown(key: str, value: Any) -> str:
    if key == "types":
        return ", ".join(f"{name} x {count}" for name, count in value.items())
    if "bytes" in key:
        return _mib(value) if value >= 2**20 else f"{value:,} bytes"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
