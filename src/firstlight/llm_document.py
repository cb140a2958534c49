"""A prefilled document: what `LLM.prefill` and `LLM.load_document` give, and questions are asked of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.core.registry import recipe, recipe_text
from firstlight.core.request import Completion, Known, SamplingParams
from firstlight.engine.answers import Answers, Encode, StreamChunk
from firstlight.engine.engine import Engine
from firstlight.prompt.encoder import Encoder, Names, Prompt
from firstlight.reuse.document import Origin, read_document, write_document


@dataclass(frozen=True, slots=True)
class Model:
    """What documents share with the `LLM` that they belong to."""

    name: str
    engine: Engine
    encoder: Encoder
    answers: Answers

    def prefill(self, text: Prompt, system: str | None, raw: bool, template_kwargs: Names, priority: int) -> Document:
        """See `LLM.prefill`."""
        is_chat = isinstance(text, str) and not raw
        if system is not None and not is_chat:
            raise UserError("a system message has no place in a raw document; leave one of the two out")
        self.engine.admission.check_documents()
        chat = partial(self.encoder.document, str(text), system, template_kwargs)
        kept: list[Known | None] = []
        work = [(chat if is_chat else partial(self.encoder.raw_document, text), SamplingParams(max_tokens=1))]
        (done,) = self.answers.complete(work, priority=priority, keep=kept.append)
        if not kept:
            raise UserError("the prefill was interrupted; start it again")
        if kept[0] is None:
            raise UserError("the document leaves no room for the requests that wait; give more with --kv-memory")
        return Document(self, done.prompt_ids, kept[0], is_chat=is_chat, report=done.report)

    def load(self, path: Path) -> Document:
        """See `LLM.load_document`."""
        self.answers.check_open()
        self.engine.admission.check_documents()
        stored, limit = read_document(path, self.origin()), self.engine.limits.max_model_len
        if len(stored.ids) >= limit:
            raise UserError(f"{path} has {len(stored.ids)} tokens, the limit is {limit - 1}; raise max_model_len")
        with self.answers.turns.alone():
            known = self.engine.load(stored.held, len(stored.ids), partial(stored.fill, self.engine.pool.layout))
        return Document(self, stored.ids.tolist(), known, is_chat=stored.is_chat)

    def origin(self) -> Origin:
        """What a document's cells depend on, besides its ids."""
        pool, parts, config = self.engine.pool, self.engine.parts, self.engine.config
        heads = config.blocks_per_column // config.num_layers
        return Origin(
            model=self.name,
            digest=self.engine.limits.model_digest,
            dtype=self.engine.machine.model.precision,
            recipe=recipe(parts),
            methods=recipe_text(parts),
            layout=pool.layout.tag,
            shape=(config.num_layers, heads, pool.block_nbytes),
        )


class Document:
    """A prefilled text: its cells are in the engine, so a question computes its own rows only.

    Threads may ask at the same time. `report` is that of its prefill, empty after a load.
    """

    def __init__(
        self, model: Model, ids: list[int], known: Known, *, is_chat: bool, report: dict[str, Any] | None = None
    ) -> None:
        self.token_ids, self.report = ids, report or {}
        self._model, self._is_chat = model, is_chat
        self._known: Known | None = known

    def ask(
        self,
        question: Prompt,
        params: SamplingParams | None = None,
        *,
        template_kwargs: Names = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> Completion:
        """The answer to a question about the document; ids are put behind the document as they are."""
        encode, known = self.asking(question, template_kwargs)
        work = [(encode, params or SamplingParams())]
        (done,) = self._model.answers.complete(work, known=known, priority=priority, ttft_slo_s=ttft_slo_s)
        return done

    def stream(
        self,
        question: Prompt,
        params: SamplingParams | None = None,
        *,
        template_kwargs: Names = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> Iterator[StreamChunk]:
        """`ask`, piece by piece. Closing the iterator cancels."""
        encode, known = self.asking(question, template_kwargs)
        return self._model.answers.stream(encode, params, known=known, priority=priority, ttft_slo_s=ttft_slo_s)

    def asking(self, question: Any, names: Names) -> tuple[Encode, Known]:
        """What a request about the document is made of."""
        return partial(self._encode, question, names), self._cells

    def save(self, path: str | Path) -> None:
        """Write the document to a file, whole or not at all, for `LLM.load_document`. Raises UserError if it can't."""
        layout = self._model.engine.pool.layout
        write_document(Path(path), self._model.origin(), self.token_ids, self._is_chat, self._cells.table, layout)

    def close(self) -> None:
        """Give the memory back, as soon as questions under way are answered."""
        known, self._known = self._known, None
        if known is not None:
            self._model.engine.admission.pins.release(known)

    def __enter__(self) -> Document:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of its K/V."""
        return int((self._cells.table > 0).sum()) * self._model.engine.pool.block_nbytes

    @property
    def _cells(self) -> Known:
        self._model.answers.check_open()
        if self._known is None:
            raise UserError("this document was closed; prefill or load it again")
        return self._known

    def _encode(self, question: Prompt, names: Names) -> PromptIds:
        after = self._model.encoder.question(question, names, is_chat=self._is_chat)
        if not after:
            raise UserError("the question is empty; give a text")
        return PromptIds([*self.token_ids, *after])
