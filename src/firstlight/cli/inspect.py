"""`firstlight inspect`: one page of pictures of one prefill: what was read, where the time went, what was computed."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from firstlight.cli.breakdown import approximations, duration
from firstlight.cli.inputs import as_messages, as_prompt, gather
from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.core.config import Options, format_bytes
from firstlight.core.errors import UserError
from firstlight.core.files import write_atomically


@with_flags(options=Options)
def inspect(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    options: Options,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="HTML", help="Where to write the page.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="What to answer.")] = None,
    document: Annotated[
        list[str], typer.Option("-f", "--document", metavar="FILE", help="Text before the prompt; - is stdin.")
    ] = [],  # noqa: B006
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the text as it is, without the chat template.")] = False,
) -> None:
    """Prefill a prompt once, and show it: one page that needs nothing but a browser.

    Density of each layer and head, the plan of a head on the grid beside the attention that dense would have had, time
    by layer and work, and which cells were computed, reused, parked or absent.

    firstlight inspect smollm2 -f report.txt -o report.html

    firstlight inspect smollm2 -f report.txt -p "What does it cost?" --method band:sink=64,window=1024 -o band.html
    """
    _check(output, raw, system)
    texts = gather(prompt, document)
    from firstlight import LLM  # here, because it brings torch
    from firstlight.cli.inspect_page import page
    from firstlight.evaluate.inspection import inspect as watched

    words: Any = as_prompt(texts) if raw else as_messages(as_prompt(texts), system)
    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    with contextlib.ExitStack() as cleanup:
        bars = cleanup.enter_context(Bars())
        llm = cleanup.enter_context(LLM(model, progress=bars, **settings))
        found = watched(llm, words)
    _write(output, page(found, document))
    report = found["report"]
    typer.echo(
        f"{output}: {format_bytes(output.stat().st_size)}; {report['prompt_tokens']:,} tokens, first token after "
        f"{duration(report['ttft_s'])}, {report['attention']['density']:.0%} of dense attention read"
    )
    if not report["exact"]:
        typer.echo(f"firstlight: approximate: {approximations(report)}", err=True)


def _check(output: Path, raw: bool, system: str | None) -> None:
    """What would be a pity to find out after the run."""
    if raw and system is not None:
        raise UserError("--system has no place in a --raw prompt; leave one of the two out")
    if output.is_dir():
        raise UserError(f"can't write {output}: it is a folder; give the name of a file with -o")
    if not output.absolute().parent.is_dir():
        raise UserError(f"can't write {output}: there is no folder {output.absolute().parent}; make it first")


def _write(output: Path, text: str) -> None:
    try:
        with write_atomically(output) as partial:
            partial.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"can't write {output}: {error.strerror}; give another -o HTML") from None
