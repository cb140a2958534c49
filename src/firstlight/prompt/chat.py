"""A conversation to the one text that the model was trained to see: the step before tokenising a chat.

The template comes with the model file, so it is untrusted code: it runs in jinja2's immutable sandbox, cannot reach
attributes that lead out of it, and every way in which it can fail is one line to the user.
"""

from __future__ import annotations

import datetime
import functools
import json
import secrets
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from firstlight.core.errors import UserError

_MAX_REPEATED = 1 << 24  # characters or items that a multiplication in a template may make
_MAX_POWER = 64
_MAX_TEXT = 1 << 28  # characters of the rendered chat


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: list[dict[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
    **kwargs: Any,
) -> str:
    """The text of a chat under a model's template, with the names that Hugging Face templates expect.

    `kwargs` are further variables of the template. UserError where the template fails or refuses the messages.
    """
    if tools and "tools" not in template:
        raise UserError("the model's chat template has no place for tools; describe them in a message, or use another")
    names: dict[str, Any] = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    names |= {"bos_token": bos_token, "eos_token": eos_token, **kwargs}
    try:
        return _bounded(_compiled(template).generate(**names))
    except _Refused as error:
        raise UserError(f"the chat template refuses these messages: {_line(error)}; change the messages") from None
    except TemplateError as error:
        raise UserError(f"the model's chat template fails: {_line(error)}; use --raw or another model") from None
    except Exception as error:  # the template's own mistakes: wrong types, missing keys, endless recursion
        what = f"{type(error).__name__}: {_line(error)}"
        raise UserError(
            f"the model's chat template fails on these messages ({what}); use --raw or change them"
        ) from None


def render_around(template: str, system: str | None, **kwargs: Any) -> tuple[str, str]:
    """The text of a chat of one user message, before that message and after it; `kwargs` as for `render_chat`.

    A text can then be tokenised apart from what follows it. UserError as above, and where the template changes or
    repeats what the user says.
    """
    words = secrets.token_hex(16)
    lead = [{"role": "system", "content": system}] if system is not None else []
    before, found, after = render_chat(template, [*lead, {"role": "user", "content": words}], **kwargs).partition(words)
    if not found or words in after:
        raise UserError("the model's chat template changes or repeats the user's text; use --raw or another model")
    return before, after


class _Refused(Exception):
    """The template called raise_exception."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, without products large enough to fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = right if operator == "**" else _repeated(left, right) or _repeated(right, left)
        if size > (_MAX_POWER if operator == "**" else _MAX_REPEATED):
            raise SecurityError("a product in the template is too large")
        return super().call_binop(context, operator, left, right)


def _repeated(value: Any, times: Any) -> int:
    """The length of a text or list repeated by `*`; 0 for a product of numbers."""
    return len(value) * times if isinstance(times, int) and hasattr(value, "__len__") else 0


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for inference it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def _bounded(pieces: Any) -> str:
    out, size = [], 0
    for piece in pieces:
        out.append(piece)
        size += len(piece)
        if size > _MAX_TEXT:
            raise SecurityError("the rendered chat is too long")
    return "".join(out)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as text: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
