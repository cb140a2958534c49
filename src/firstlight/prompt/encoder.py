"""What a caller hands over, to token ids: a text, ids, a conversation, or a document and the questions about it.

A document and a question are tokenised apart, so that the ids of a document don't depend on what is asked: the chat
text before it belongs to the document, the chat text after the question to the question.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.prompt.chat import render_around, render_chat
from firstlight.prompt.spans import Place, flat, places, tokens_in, told
from firstlight.prompt.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Prompt = str | list[int] | list[dict[str, Any]] | PromptIds
"""A text, ids, a text in parts of OpenAI's form, or ids of which is known what is context."""
Tools = list[dict[str, Any]]
"""Functions that the model may call, in OpenAI's form."""
Names = Mapping[str, Any] | None
"""Variables of a model's own chat template, such as `enable_thinking`."""


class Encoder:
    """One model's way from words to ids. Every method raises UserError on what it can't encode.

    `marks`: whether somebody asks which ids are context and question (`spans.py`); it costs a few more tokenisations.
    """

    def __init__(self, tokenizer: Tokenizer, model_name: str, *, marks: bool = False) -> None:
        self._tokenizer, self._model_name, self._marks = tokenizer, model_name, marks

    def text(self, text: str | Messages) -> PromptIds:
        """A text as the model expects one that is no chat; or the parts of one."""
        known = told(text)
        words = known.words
        place = Place((0, len(words)), (0, known.context), words[known.context :])
        return self._marked(words, [place], lambda lo, hi: self._tokenizer.encode(words[lo:hi]))

    def chat(self, messages: Messages, tools: Tools | None = None, names: Names = None) -> PromptIds:
        """A conversation, up to where the model answers."""
        template, settings = self._template(names)

        def render(given: Messages) -> str:
            return render_chat(template, given, tools=tools, **settings)

        text = render(flat(messages))
        found = places(render, messages, text)

        def encode(lo: int, hi: int) -> list[int]:
            plain = [(max(a, lo) - lo, min(b, hi) - lo) for a, b in (place.whole for place in found)]
            return self._tokenizer.encode(text[lo:hi], special=True, plain=[(a, b) for a, b in plain if a < b])

        return self._marked(text, found, encode)

    def prompt(self, prompt: Prompt | Messages, tools: Tools | None = None, names: Names = None) -> PromptIds:
        """Whichever of them it is."""
        if isinstance(prompt, PromptIds):
            return prompt
        if isinstance(prompt, str):
            return self.text(prompt)
        if len(prompt) and isinstance(prompt[0], dict):
            return self.chat(prompt, tools, names) if "role" in prompt[0] else self.text(prompt)
        return PromptIds(_ids(prompt))

    def document(self, text: str, system: str | None, names: Names) -> PromptIds:
        """A chat up to the document's last word. Control tokens that the document spells are ordinary text."""
        if not text.strip():
            raise UserError("the document is empty; give a text")
        template, settings = self._template(names)
        before, _ = render_around(template, system, **settings)
        lead = self._tokenizer.begun(self._tokenizer.encode(before, special=True))
        return self._all_context(lead, self._tokenizer.encode(text.strip("\n")))

    def raw_document(self, text: Prompt) -> PromptIds:
        """A document that is no chat: a text, or ids as they are."""
        if not isinstance(text, str):
            return PromptIds(_ids(text))
        return self._all_context(self._tokenizer.bos_ids, self._tokenizer.encode(text))

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

    def _all_context(self, lead: Sequence[int], ids: Sequence[int]) -> PromptIds:
        """Ids that are context, after some that are not."""
        spans = [(len(lead), len(lead) + len(ids))] if ids else []
        return PromptIds([*lead, *ids], spans, None, self._tokenizer.decode)

    def _marked(self, text: str, found: Sequence[Place], encode: Callable[[int, int], list[int]]) -> PromptIds:
        """A text's ids, its BOS before them; `encode` gives those of a stretch of it."""
        ids = encode(0, len(text))
        whole = self._tokenizer.begun(ids)
        if not self._marks:
            return PromptIds(whole)
        context = [
            tokens_in(place.context, ids, len(text), encode) for place in found if place.context[0] < place.context[1]
        ]
        shift = len(whole) - len(ids)
        spans = [(lo + shift, hi + shift) for lo, hi in context if lo < hi]
        question = next((place.question for place in reversed(found) if place.question), "")
        return PromptIds(whole, spans, question, self._tokenizer.decode)

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
