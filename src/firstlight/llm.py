"""The Python API: a model, prompts in, completions out.

llm = LLM("smollm2")
print(llm.chat([{"role": "user", "content": "Why is the sky blue?"}])[0].text)

document = llm.prefill(Path("report.txt").read_text())
print(document.ask("What does it cost?").text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from firstlight.core.config import int8_parts
from firstlight.core.errors import UserError
from firstlight.core.request import Completion, SamplingParams
from firstlight.core.settings import gather_options
from firstlight.engine.answers import Answers, Encode, StreamChunk
from firstlight.engine.build import DTYPES, build_engine
from firstlight.engine.work import Stop, Work
from firstlight.kernels.dispatch import cap_instruction_set
from firstlight.llm_document import Document, Model
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.models.weights.store import kept
from firstlight.models.weights.values import CompactWeights, Weights
from firstlight.prompt.encoder import Encoder, Messages, Names, Prompt, Tools
from firstlight.prompt.tokenizer import Tokenizer

_PROGRESS_S = 0.25
"""Progress is told so often. A pass whose progress nobody follows goes on until there is news."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far long work is: a model fetched or loaded (0..1), or prompt tokens through it (layers count in parts)."""

    phase: Literal["fetch", "load", "prefill"]
    done: float
    total: float
    rid: str | None = None


class LLM:
    """A model that answers prompts. Options are the engine's of `firstlight run --help`, as keywords.

    What no keyword says comes from `FIRSTLIGHT_*` variables, then from the settings file (`core/settings.py`).

    Raises UserError on a wrong model, option or prompt. Threads may share it: what they ask at the same time runs in
    one batch. `close` frees everything. In all calls the requests of a smaller `priority` are served first, those of
    equal priority in order; `ttft_slo_s`, the seconds in which a first token is wanted, is told to the schedule.
    """

    def __init__(
        self, model: str | Path, *, progress: Callable[[Progress], None] | None = None, **options: Any
    ) -> None:
        began = time.perf_counter()
        self._progress, self._tell_at = progress or (lambda _: None), 0.0
        self.options = gather_options(options)
        if self.options.deterministic:
            cap_instruction_set()
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        path = resolve(str(model), progress=lambda share: self._progress(Progress("fetch", share, 1.0)))
        checkpoint = open_checkpoint(path)
        self.model_name, self.config = str(model), checkpoint.config
        self.tokenizer = Tokenizer.from_source(checkpoint.tokenizer_source)
        kind = CompactWeights if self.options.weights == "compact" else Weights
        weights = kind(checkpoint, DTYPES[self.options.compute])
        nbytes = sum(map(weights.nbytes, weights))
        keep = partial(
            kept,
            checkpoint.digest,
            expected=round(nbytes / (2 if "linears" in int8_parts(self.options.precision) else 1)),
            progress=lambda share: self._progress(Progress("load", share, 1.0)),
        )
        self.engine = build_engine(checkpoint.config, weights, self.options, checkpoint.digest, keep)
        self.engine.on_stop, self.engine.patience_s = (self._on_stop, _PROGRESS_S) if progress else (None, inf)
        self.answers = Answers(self.engine, self.tokenizer, self.model_name, asdict(self.options))
        self.encoder = Encoder(self.tokenizer, self.model_name, marks=self.answers.editing.is_on)
        self._model = Model(self.model_name, self.engine, self.encoder, self.answers)
        self.load_s = self.answers.load_s = time.perf_counter() - began

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> list[Completion]:
        """Complete texts or token ids, all in one batch; in the order of the prompts, a prompt's `n` together.

        A text may come in parts, like a message's content: `prompt/spans.py` says what that means to a compressor.
        """
        many: Any = [prompts] if _is_one(prompts) else prompts
        work = _pairs([partial(self.encoder.prompt, prompt) for prompt in many], params)
        return self.answers.complete(work, priority=priority, ttft_slo_s=ttft_slo_s)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        template_kwargs: Names = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> list[Completion]:
        """Answer one conversation ({"role", "content"} messages) or several; see `encode_chat`.

        A content is a text, or a list of parts of type text: documents first, the question last.
        """
        many: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        work = _pairs([partial(self.encoder.chat, each, tools, template_kwargs) for each in many], params)
        return self.answers.complete(work, priority=priority, ttft_slo_s=ttft_slo_s)

    def stream(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        template_kwargs: Names = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> Iterator[StreamChunk]:
        """An answer, piece by piece; a list of messages is a conversation. Closing the iterator cancels.

        With `n` there are several, made together and given one after the other, each with its completion at its end.
        """
        encode = partial(self.encoder.prompt, prompt, tools, template_kwargs)
        return self.answers.stream(encode, params, priority=priority, ttft_slo_s=ttft_slo_s)

    def prefill(
        self,
        text: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        template_kwargs: Names = None,
        priority: int = 0,
    ) -> Document:
        """Compute the cells of a document once, then ask about it as often as you like.

        It opens the user's message of a chat, after the `system` message. A `raw` text, or ids, are taken as they are.
        """
        return self._model.prefill(text, system, raw, template_kwargs, priority)

    def load_document(self, path: str | Path) -> Document:
        """What `Document.save` wrote. Raises UserError if it is damaged, or of another model, type or method."""
        return self._model.load(Path(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as `generate` makes them."""
        return list(self.encoder.text(text).ids)

    def encode_chat(self, messages: Messages, tools: Tools | None = None, template_kwargs: Names = None) -> list[int]:
        """Token ids of a conversation, up to where the model answers. Raises UserError without a chat template."""
        return list(self.encoder.chat(messages, tools, template_kwargs).ids)

    def close(self) -> None:
        """End every answer, free the KV, end the event log. Nothing can be asked any more."""
        self.answers.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _on_stop(self, work: Work, stop: Stop) -> None:
        now, layers = time.perf_counter(), self.config.num_layers
        if now < self._tell_at and (stop.level, stop.layer + 1) != ("layer", layers):  # the end is always told
            return
        self._tell_at = now + _PROGRESS_S
        for live, segment in zip(work.lives, work.unit.segments):
            if segment.kind == "prefill":
                (t0, t1), done = segment.tok, (stop.layer + (stop.level == "layer")) / layers
                self._progress(Progress("prefill", t0 + (t1 - t0) * done, live.num_prompt, live.rid))


def _is_one(prompts: Any) -> bool:
    """A text, ids, or the parts of a text: not several of them."""
    return isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int | dict)
    )


def _pairs(
    prompts: Sequence[Encode], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Encode, SamplingParams]]:
    """Each prompt with its sampling params."""
    given = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
    if len(given) != len(prompts):
        raise UserError(f"{len(prompts)} prompts came with {len(given)} sampling params; give one, or one for each")
    return [(prompt, each or SamplingParams()) for prompt, each in zip(prompts, given)]
