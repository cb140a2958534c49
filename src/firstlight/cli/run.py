"""`firstlight run`: one prompt to one answer, streamed, and where its time went."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.console import Console

from firstlight.cli.breakdown import approximations, breakdown
from firstlight.cli.inputs import as_messages, as_prompt, gather, joined, wants_chat
from firstlight.cli.options import with_flags
from firstlight.cli.progress import Bars
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.request import Completion, SamplingParams


@with_flags(sampling=SamplingParams, options=Options)
def run(
    model: Annotated[str, typer.Argument(help="A name of `firstlight models list`, or a path.")],
    sampling: SamplingParams,
    options: Options,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="What to answer.")] = None,
    document: Annotated[
        list[str], typer.Option("-f", "--document", metavar="FILE", help="Text before the prompt; - is stdin.")
    ] = [],  # noqa: B006
    prefilled: Annotated[
        str | None, typer.Option("--prefilled", metavar="DOC", help="Ask about a document of `firstlight prefill`.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
) -> None:
    """Answer a prompt, or chat if there is none and a terminal to type on; in the chat, /help lists its commands.

    Text on standard input is the prompt; beside -p it is one more document. Documents go before the prompt.

    firstlight run smollm2

    firstlight run smollm2 -p "Why is the sky blue?"

    firstlight run smollm2 -f report.txt -p "What does it cost?" --max-tokens 60

    git diff | firstlight run smollm2 -p "Describe this change."

    firstlight run smollm2 --prefilled report.doc -p "What does it cost?"
    """
    if prefilled is None and wants_chat(prompt, document) and not (raw or as_json):
        from firstlight.cli.chat import chat  # here, because it is made of what stands below

        chat(model, document, system, sampling, options)
        return
    if prefilled is not None and (raw or system is not None):
        flag = "--raw" if raw else "--system"
        raise UserError(f"{flag} was settled when the document was prefilled; leave it out")
    if raw and system is not None:
        raise UserError("--system has no place in a --raw prompt; leave one of the two out")
    texts = gather(prompt, document)
    words: Any = as_prompt(texts) if prefilled is None else joined(texts)
    words = words if raw or prefilled is not None else as_messages(words, system)
    completion = answer(model, words, sampling, options, prefilled, quiet=as_json)
    conclude(completion.report, as_json)


def answer(
    model: str, prompt: Any, sampling: SamplingParams, options: Options, prefilled: str | None = None, *, quiet: bool
) -> Completion:
    """The completion of a prompt, or of a question about a document; leaves nothing behind.

    Its text goes to stdout as it comes, unless `quiet`.
    """
    from firstlight import LLM  # here, because it brings torch

    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    with contextlib.ExitStack() as cleanup:
        bars = cleanup.enter_context(Bars())
        llm = cleanup.enter_context(LLM(model, progress=bars, **settings))
        asked = llm if prefilled is None else llm.load_document(prefilled)
        # Closing the stream cancels the request, whatever ended the loop.
        stream: Any = asked.stream(prompt, sampling)
        cleanup.enter_context(contextlib.closing(stream))
        return print_stream(stream, bars, quiet)


def print_stream(stream: Iterable[Any], bars: Bars, quiet: bool) -> Completion:
    """The first answer; texts go to stdout as they come, unless `quiet`.

    Where there are several, its report has all of them under `choices`, as OpenAI's API does.
    """
    completions: list[Completion] = []
    between = ""
    for chunk in stream:
        if chunk.text and not quiet:
            bars.close()
            sys.stdout.write(between + chunk.text)
            sys.stdout.flush()
            between = ""
        if chunk.completion is not None:
            completions.append(chunk.completion)
            between += "\n---\n"
    first = completions[0]
    if len(completions) > 1:
        first.report["choices"] = [{key: c.report[key] for key in _CHOICE if key in c.report} for c in completions]
    return first


_CHOICE = ("index", "text", "token_ids", "finish_reason", "stop_reason", "logprobs")


def conclude(report: dict[str, Any], as_json: bool) -> None:
    """What comes after the text: the report as JSON, or a breakdown for a person and a warning for anybody."""
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    elif not report["text"].endswith("\n"):
        typer.echo()
    console = Console(stderr=True)
    if not report["exact"]:
        typer.echo(f"firstlight: approximate: {approximations(report)}", err=True)
    if console.is_terminal and not as_json:
        console.print(breakdown(report))
