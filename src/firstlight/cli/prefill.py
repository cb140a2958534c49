"""`firstlight prefill`: a document's cells to a file, so that questions about it need not compute them again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from firstlight.cli.breakdown import duration
from firstlight.cli.inputs import gather, joined
from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.core.config import Options, format_bytes


@with_flags(options=Options)
def prefill(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    options: Options,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DOC", help="Where to write the document.")],
    document: Annotated[
        list[str], typer.Option("-f", "--document", metavar="FILE", help="The text; - is stdin. Several are joined.")
    ] = [],  # noqa: B006
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a line.")] = False,
) -> None:
    """Prefill a document once, ask about it often.

    The file holds the K/V of the text: about as many bytes as `firstlight models show` says for each token. It can be
    used with the same model, precision and methods only.

    firstlight prefill smollm2 -f report.txt -o report.doc

    firstlight run smollm2 --prefilled report.doc -p "What does it cost?"
    """
    from firstlight import LLM  # here, because it brings torch

    text = joined(gather(None, document))
    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    with contextlib.ExitStack() as cleanup:
        bars = cleanup.enter_context(Bars())
        llm = cleanup.enter_context(LLM(model, progress=bars, **settings))
        made = llm.prefill(text, system=system, raw=raw)
        bars.close()
        made.save(output)
        facts = made.report | {"document": _facts(output, made)}
    typer.echo(json.dumps(facts, ensure_ascii=False, indent=2) if as_json else _line(facts))


def _facts(path: str, made: Any) -> dict[str, Any]:
    return {
        "path": path,
        "tokens": len(made.token_ids),
        "kv_bytes": made.nbytes,
        "file_bytes": Path(path).stat().st_size,
    }


def _line(facts: dict[str, Any]) -> str:
    document = facts["document"]
    size, seconds = format_bytes(document["file_bytes"]), duration(facts["ttft_s"])
    return f"{document['path']}: {document['tokens']:,} tokens in {seconds}, {size}"
