"""The Python API: a model, prompts in, completions out.

llm = LLM("smollm2")
print(llm.chat([{"role": "user", "content": "Why is the sky blue?"}])[0].text)
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from firstlight.core.errors import UserError
from firstlight.core.request import Completion, Logprobs, Request, SamplingParams, TokenOutput
from firstlight.core.settings import gather_options
from firstlight.decode.logprobs import watch_prompt
from firstlight.decode.structured import Grammars
from firstlight.engine.build import DTYPES, build_engine
from firstlight.engine.forward import Pass, Stop
from firstlight.engine.live import LiveRequest
from firstlight.engine.report import report
from firstlight.kernels.dispatch import cap_instruction_set
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.models.weights.store import load_weights
from firstlight.prompt.chat import render_chat
from firstlight.prompt.detokenize import Detokenizer
from firstlight.prompt.tokenizer import Tokenizer

SCHEMA_VERSION = 1
Messages = list[dict[str, Any]]
Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far long work is: a model fetched or loaded (0..1), or prompt tokens through it (layers count in parts)."""

    phase: Literal["fetch", "load", "prefill"]
    done: float
    total: float
    rid: str | None = None


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """New text and tokens of a stream; the last one brings the completion."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None
    logprobs: list[Logprobs] | None = None
    index: int = 0
    """Which of the `n` answers."""


@dataclass(slots=True)
class _Answer:
    """A request under way, seen from outside."""

    live: LiveRequest
    tokenize_s: float
    index: int = 0
    prompt_logprobs: list[Logprobs | None] | None = None
    text: str = ""
    chunks: deque[StreamChunk] = field(default_factory=deque)
    """Made and not yet read."""


class LLM:
    """A model that answers prompts. Options are the engine's of `firstlight run --help`, as keywords.

    What no keyword says comes from `FIRSTLIGHT_*` variables, then from the settings file (`core/settings.py`).

    Raises UserError on a wrong model, option or prompt. One thread at a time; `close` frees everything.
    """

    def __init__(
        self, model: str | Path, *, progress: Callable[[Progress], None] | None = None, **options: Any
    ) -> None:
        began = time.perf_counter()
        self._progress = progress or (lambda _: None)
        self.options = gather_options(options)
        if self.options.deterministic:
            cap_instruction_set()
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        path = resolve(str(model), progress=lambda share: self._progress(Progress("fetch", share, 1.0)))
        checkpoint = open_checkpoint(path)
        self.model_name, self.config = str(model), checkpoint.config
        self.tokenizer = Tokenizer.from_source(checkpoint.tokenizer_source)
        weights = load_weights(
            checkpoint,
            DTYPES[self.options.precision],
            progress=lambda share: self._progress(Progress("load", share, 1.0)),
        )
        self.engine = build_engine(checkpoint.config, weights, self.options, checkpoint.digest)
        self.engine.on_stop = self._on_stop
        self._answers: dict[str, _Answer] = {}
        tokens = min(self.tokenizer.vocab_size, self.config.vocab_size)
        self._grammars = Grammars(self.tokenizer.text_bytes, tokens, self.config.vocab_size, self.tokenizer.eos_ids)
        self._numbers = itertools.count()
        self._is_open = True
        self.load_s = time.perf_counter() - began

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete texts or token ids, all in one batch; in the order of the prompts, a prompt's `n` together."""
        many = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else list(prompts)
        given = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(given) != len(many):
            raise UserError(f"{len(many)} prompts came with {len(given)} sampling params; give one, or one for each")
        return self._complete([(p, q or SamplingParams()) for p, q in zip(many, given)])  # type: ignore[misc]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer one conversation ({"role", "content"} messages) or several."""
        many = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        return self.generate([self.encode_chat(m) for m in many], params)  # type: ignore[arg-type]

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """An answer, piece by piece; a list of messages is a conversation. Closing the iterator cancels.

        With `n` there are several, made together and given one after the other, each with its completion at its end.
        """
        chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        ids: Any = self.encode_chat(prompt) if chat else prompt  # type: ignore[arg-type]
        rids = self._add(ids, params or SamplingParams())
        try:
            for rid in rids:
                last = False
                while not last:
                    chunk = self._next(rid)
                    last = chunk.completion is not None
                    yield chunk
        finally:
            self._abandon(rids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as `generate` makes them."""
        return [*self.tokenizer.bos_ids, *self.tokenizer.encode(text)]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, up to where the model answers. Raises UserError without a chat template."""
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError(f"{self.model_name} has no chat template; use --raw, or generate() with a plain text")
        text = render_chat(template, messages, **self.tokenizer.template_tokens)
        return self.tokenizer.begun(self.tokenizer.encode(text, special=True))

    def close(self) -> None:
        """End every answer, free the KV, end the event log. Nothing can be asked any more."""
        self._is_open = False
        self._answers.clear()
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _complete(self, work: Sequence[tuple[Prompt, SamplingParams]]) -> list[Completion]:
        rids: list[str] = []
        try:
            for prompt, params in work:
                rids += self._add(prompt, params)
            return [self._last(rid) for rid in rids]
        finally:
            self._abandon(rids)

    def _add(self, prompt: Prompt, params: SamplingParams) -> list[str]:
        """The requests of one prompt's answers, queued."""
        self._check_open()
        began = time.perf_counter()
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise UserError(f"token id {bad[0]} is not in the vocabulary of {self.config.vocab_size}; check the ids")
        requests = [self._request(ids, params, index) for index in range(params.n)]
        first, rows = requests[0], watch_prompt(requests[0])
        for index, request in enumerate(requests):
            request.after = first.rid if index else None
            live = self.engine.add(request)
            self._answers[request.rid] = _Answer(live, live.stamps.arrived - began, index, rows)
        return [request.rid for request in requests]

    def _request(self, ids: list[int], params: SamplingParams, index: int) -> Request:
        """Answer `index` of a prompt. Raises UserError on what this model can't do."""
        if bad := [i for i in (*params.stop_token_ids, *params.logit_bias) if i >= self.config.vocab_size]:
            raise UserError(f"token id {bad[0]} is not in the vocabulary of {self.config.vocab_size}; check the ids")
        own = params if params.seed is None else replace(params, seed=params.seed + index)
        return Request(
            f"r{next(self._numbers)}",
            ids,
            own,
            eos_ids=self.tokenizer.eos_ids,
            text=Detokenizer(self.tokenizer),
            structure=self._grammars.structure(params),
        )

    def _next(self, rid: str) -> StreamChunk:
        """The next piece of one answer; pieces of others that come meanwhile wait for their readers."""
        self._check_open()
        while not self._answers[rid].chunks:
            for output in self.engine.step():
                if (answer := self._answers.get(output.rid)) is not None:
                    answer.chunks.append(self._chunk(answer, output))
        return self._answers[rid].chunks.popleft()

    def _check_open(self) -> None:
        if not self._is_open:
            raise UserError("this LLM was closed; make another one")

    def _last(self, rid: str) -> Completion:
        while (completion := self._next(rid).completion) is None:
            pass
        return completion

    def _chunk(self, answer: _Answer, output: TokenOutput) -> StreamChunk:
        """An engine's output as its reader gets it."""
        answer.text += output.text
        self._name(output.logprobs or [])
        completion = None if output.finish_reason is None else self._finish(answer)
        return StreamChunk(output.text, output.new_ids, completion, output.logprobs, answer.index)

    def _name(self, places: Sequence[Logprobs | None]) -> None:
        """Give the tokens of log-probabilities their texts."""
        for token, entry in ((token, entry) for place in places for token, entry in (place or {}).items()):
            entry.decoded_token = self.tokenizer.decode([token])

    def _finish(self, answer: _Answer) -> Completion:
        live, text, decoding = answer.live, answer.text, answer.live.decoding
        facts = report(live, self.engine.parts)
        facts["timings"] = {"load_s": self.load_s, "tokenize_s": answer.tokenize_s} | facts["timings"]
        facts["ttft_s"] += answer.tokenize_s
        head = {"schema_version": SCHEMA_VERSION, "model": self.model_name, "text": text}
        settings = asdict(self.options)
        facts = head | facts | {"settings": settings | {"sampling": asdict(live.request.sampling)}}
        logprobs = None if decoding.params.logprobs is None else decoding.logprobs
        self._name(answer.prompt_logprobs or [])
        facts |= {"index": answer.index, "stop_reason": decoding.stop_reason}
        for key, places in (("logprobs", logprobs), ("prompt_logprobs", answer.prompt_logprobs)):
            facts |= {} if places is None else {key: [_plain(place) for place in places]}
        return Completion(
            list(live.request.prompt_ids),
            decoding.token_ids,
            text,
            live.finish_reason or "error",
            facts,
            answer.index,
            decoding.stop_reason,
            logprobs,
            answer.prompt_logprobs,
        )

    def _abandon(self, rids: Sequence[str]) -> None:
        """Whatever is still under way of these is cancelled, and gone when this returns."""
        left = [rid for rid in rids if self._answers.pop(rid, None) is not None]
        for rid in left:
            self.engine.cancel(rid)
        while any(self.engine.is_live(rid) for rid in left):
            self.engine.step()

    def _on_stop(self, work: Pass, stop: Stop) -> None:
        layers = self.config.num_layers
        for live, segment in zip(work.lives, work.unit.segments):
            if segment.kind == "prefill":
                (t0, t1), done = segment.tok, min(stop.layer + (stop.level == "layer"), layers) / layers
                self._progress(Progress("prefill", t0 + (t1 - t0) * done, live.num_prompt, live.rid))


def _plain(place: Logprobs | None) -> dict[str, Any] | None:
    """Log-probabilities of one place as JSON has them."""
    return None if place is None else {str(token): asdict(entry) for token, entry in place.items()}


def _is_ids(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int)
