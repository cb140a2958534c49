"""Answers: requests seen from outside, from what encodes a prompt to chunks of text and a report.

Between the Python API and the engine's loop. Threads may share it; each waits for its own answers only.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from firstlight.core.config import int8_parts
from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.core.request import Completion, Logprobs, Request, SamplingParams, TokenOutput
from firstlight.decode.logprobs import watch_prompt
from firstlight.decode.structured import Grammars
from firstlight.engine.editing import Edited, Editing
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.engine.report import report
from firstlight.engine.turns import Turns
from firstlight.prompt.detokenize import Detokenizer
from firstlight.prompt.tokenizer import Tokenizer

SCHEMA_VERSION = 1
Encode = Callable[[], PromptIds]
"""Makes a prompt's ids; called, and timed, when its request begins."""
Check = Callable[[], None]
"""Raises when nobody waits for an answer any more; called while its prompt is edited."""


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
    edited: Edited
    index: int = 0
    prompt_logprobs: list[Logprobs | None] | None = None
    text: str = ""
    chunks: deque[StreamChunk] = field(default_factory=deque)
    """Made and not yet read."""
    give: Callable[[StreamChunk], None] | None = None
    """Takes the chunks instead, on the thread that made them."""


class Answers:
    """All answers of one engine. `settings` and `load_s` are for their reports."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model_name: str, settings: Mapping[str, Any]) -> None:
        self._engine, self._tokenizer, self._model_name, self._settings = engine, tokenizer, model_name, dict(settings)
        self._vocab_size = engine.machine.model.config.vocab_size
        tokens = min(tokenizer.vocab_size, self._vocab_size)
        self._grammars = Grammars(tokenizer.text_bytes, tokens, self._vocab_size, tokenizer.eos_ids)
        self._answers: dict[str, _Answer] = {}
        self._entering = threading.Lock()
        self._numbers = itertools.count()
        self.turns = Turns(engine, self._deliver)
        self.editing = Editing(engine.parts, engine.machine.model, engine.admission.known)
        self.load_s = 0.0

    def complete(self, work: Sequence[tuple[Encode, SamplingParams]], **terms: Any) -> list[Completion]:
        """Answers of a batch, all under the same `terms`."""
        rids: list[str] = []
        try:
            for encode, params in work:
                rids += self.add(encode, params, **terms)
            return [self._last(rid) for rid in rids]
        finally:
            self._abandon(rids)

    def stream(self, encode: Encode, params: SamplingParams | None, **terms: Any) -> Iterator[StreamChunk]:
        rids = self.add(encode, params or SamplingParams(), **terms)
        try:
            for rid in rids:
                last = False
                while not last:
                    chunk = self._next(rid)
                    last = chunk.completion is not None
                    yield chunk
        finally:
            self._abandon(rids)

    def add(
        self,
        encode: Encode,
        params: SamplingParams,
        give: Callable[[StreamChunk], None] | None = None,
        check: Check = lambda: None,
        **terms: Any,
    ) -> list[str]:
        """Queue the requests of one prompt's answers, for whoever steps; `terms` are further fields of them."""
        self.check_open()
        began = time.perf_counter()
        edited = self._edited(replace(encode(), max_tokens=params.max_tokens), check)
        requests = [self._request(edited.ids, params, index, terms) for index in range(params.n)]
        first, rows = requests[0], watch_prompt(requests[0])
        try:
            for index, request in enumerate(requests):
                request.after = first.rid if index else None
                with self._entering:  # its first output may be made before this is over
                    live = self._engine.add(request)
                    tokenize_s = live.stamps.arrived - began - edited.seconds
                    answer = _Answer(live, tokenize_s, edited, index, rows, give=give)
                    self._answers[request.rid] = answer
        except BaseException:
            for request in requests:
                self.forget(request.rid)
            raise
        self.turns.wake()
        return [request.rid for request in requests]

    def _edited(self, prompt: PromptIds, check: Check) -> Edited:
        """The ids that are admitted. Raises UserError on ids that can't be."""
        if bad := [i for i in prompt.ids if not 0 <= i < self._vocab_size]:
            raise UserError(f"token id {bad[0]} is not in the vocabulary of {self._vocab_size}; check the ids")

        def still_wanted() -> None:
            self.check_open()
            check()

        edited = self.editing.edit(prompt, still_wanted)
        still_wanted()
        return edited

    def _request(self, ids: list[int], params: SamplingParams, index: int, terms: dict[str, Any]) -> Request:
        """Answer `index` of a prompt. Raises UserError on what this model can't do."""
        if bad := [i for i in (*params.stop_token_ids, *params.logit_bias) if i >= self._vocab_size]:
            raise UserError(f"token id {bad[0]} is not in the vocabulary of {self._vocab_size}; check the ids")
        own = params if params.seed is None else replace(params, seed=params.seed + index)
        return Request(
            f"r{next(self._numbers)}",
            ids,
            own,
            eos_ids=self._tokenizer.eos_ids,
            text=Detokenizer(self._tokenizer),
            structure=self._grammars.structure(params),
            **terms,
        )

    def _deliver(self, output: TokenOutput) -> None:
        """An engine's output to whom it belongs; those who left get nothing."""
        with self._entering:
            answer = self._answers.get(output.rid)
        if answer is not None:
            (answer.give or answer.chunks.append)(self._chunk(answer, output))

    def _next(self, rid: str) -> StreamChunk:
        """The next piece of one answer; pieces of others that come meanwhile wait for their readers."""
        while True:
            self.check_open()
            if (answer := self._answers[rid]).chunks:
                return answer.chunks.popleft()
            self.turns.step()

    def check_open(self) -> None:
        if self.turns.is_over:
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
        """Give the tokens of log-probabilities their texts: with their spaces, and control tokens by name."""
        for token, entry in ((token, entry) for place in places for token, entry in (place or {}).items()):
            entry.decoded_token = self._tokenizer.token_bytes(token).decode(errors="replace")

    def _finish(self, answer: _Answer) -> Completion:
        live, text, decoding = answer.live, answer.text, answer.live.decoding
        facts = report(live, self._engine.parts)
        answer.edited.tell(facts)
        facts["timings"] = {"load_s": self.load_s, "tokenize_s": answer.tokenize_s} | facts["timings"]
        facts["ttft_s"] += answer.tokenize_s
        head = {"schema_version": SCHEMA_VERSION, "model": self._model_name, "text": text}
        request = live.request
        asked = {"sampling": asdict(request.sampling), "priority": request.priority, "ttft_slo_s": request.ttft_slo_s}
        facts["exact"] = facts["exact"] and not int8_parts(self._settings["precision"])
        facts = head | facts | {"settings": self._settings | asked}
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

    def forget(self, rid: str) -> bool:
        """Nobody wants this answer any more: cancel it if it is under way. Whether it was known."""
        known = self._answers.pop(rid, None) is not None
        self._engine.cancel(rid)
        return known

    def _abandon(self, rids: Sequence[str]) -> None:
        """Whatever is still under way of these is cancelled, and gone when this returns."""
        if sys.is_finalizing():  # a stream that was never read to its end; half of Python is gone by now
            return
        left = [rid for rid in rids if self.forget(rid)]
        while not self.turns.is_over and any(self._engine.is_live(rid) for rid in left):
            self.turns.step()

    def close(self) -> None:
        """End every answer, and the engine."""
        with self.turns.alone():
            self.turns.is_over = True
            self._answers.clear()
            self._engine.close()


def _plain(place: Logprobs | None) -> dict[str, Any] | None:
    """Log-probabilities of one place as JSON has them."""
    return None if place is None else {str(token): asdict(entry) for token, entry in place.items()}
