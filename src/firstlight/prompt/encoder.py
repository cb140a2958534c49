"""What a caller hands over, to token ids: a text, ids, a conversation, or a document and the questions about it.

A document and a question are tokenised apart, so that the ids of a document don't depend on what is asked: the chat
text before it belongs to the document, the chat text after the question to the question.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from firstlight.core.errors import UserError
from firstlight.prompt.chat import render_around, render_chat
from firstlight.prompt.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Prompt = str | list[int]
Tools = list[dict[str, Any]]
"""Functions that the model may call, in OpenAI's form."""
Names = Mapping[str, Any] | None
"""Variables of a model's own chat template, such as `enable_thinking`."""


class Encoder:
    """One model's way from words to ids. Every method raises UserError on what it can't encode."""

    def __init__(self, tokenizer: Tokenizer, model_name: str) -> None:
        self._tokenizer, self._model_name = tokenizer, model_name

    def text(self, text: str) -> list[int]:
        """A text as the model expects one that is no chat."""
        return [*self._tokenizer.bos_ids, *self._tokenizer.encode(text)]

    def chat(self, messages: Messages, tools: Tools | None = None, names: Names = None) -> list[int]:
        """A conversation, up to where the model answers."""
        template, settings = self._template(names)
        text = render_chat(template, messages, tools=tools, **settings)
        return self._tokenizer.begun(self._tokenizer.encode(text, special=True))

    def prompt(self, prompt: Prompt | Messages, tools: Tools | None = None, names: Names = None) -> list[int]:
        """Whichever of the three it is."""
        if isinstance(prompt, str):
            return self.text(prompt)
        if len(prompt) and isinstance(prompt[0], dict):
            return self.chat(prompt, tools, names)
        return _ids(prompt)

    def document(self, text: str, system: str | None, names: Names) -> list[int]:
        """A chat up to the document's last word. Control tokens that the document spells are ordinary text."""
        if not text.strip():
            raise UserError("the document is empty; give a text")
        template, settings = self._template(names)
        before, _ = render_around(template, system, **settings)
        lead = self._tokenizer.begun(self._tokenizer.encode(before, special=True))
        return [*lead, *self._tokenizer.encode(text.strip("\n"))]

    def question(self, question: Prompt, names: Names, *, is_chat: bool) -> list[int]:
        """What comes after a document: in a chat a blank line, the question and the way to the answer."""
        if not isinstance(question, str):
            return _ids(question)
        if not is_chat:
            return self._tokenizer.encode(question)
        if not question.strip():
            raise UserError("the question is empty; give a text")
        template, settings = self._template(names)
        _, after = render_around(template, None, **settings)
        words = "\n\n" + question.strip("\n")
        return [*self._tokenizer.encode(words), *self._tokenizer.encode(after, special=True)]

    def _template(self, names: Names) -> tuple[str, dict[str, Any]]:
        """The chat template, and what the caller sets in it."""
        if taken := {"template", "messages", "tools", "bos_token", "eos_token"} & set(names or ()):
            raise UserError(f"template_kwargs can't set {', '.join(sorted(taken))}; it is for the template's own names")
        if self._tokenizer.chat_template is None:
            raise UserError(f"{self._model_name} has no chat template; use --raw, or generate() with a plain text")
        return self._tokenizer.chat_template, {**self._tokenizer.template_tokens, **(names or {})}


def _ids(given: Any) -> list[int]:
    """Ids as Python's own integers, whatever kind they came as."""
    try:
        return [operator.index(token) for token in given]
    except TypeError:
        raise UserError("a prompt is a text, a list of token ids, or a list of messages; give one of them") from None
