"""The Python API for asyncio: what a server stands on.

llm = AsyncLLM("smollm2")
async for chunk in llm.stream(await llm.add("Once upon a time")):
    print(chunk.text)

One thread runs the engine, prompts are tokenised on others, and the event loop only passes chunks on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.request import SamplingParams
from firstlight.engine.answers import Encode, StreamChunk
from firstlight.llm import LLM
from firstlight.llm_document import Document
from firstlight.prompt.encoder import Messages, Names, Prompt, Tools

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Stream:
    """Chunks on their way to the task that reads them; None is the end that nobody wanted."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[StreamChunk | None] = field(default_factory=asyncio.Queue)
    rids: Sequence[str] = ()
    """Of the answers, as many as `n`; the first is the stream's name."""
    is_read: bool = False
    is_gone: bool = False

    def check(self) -> None:
        """Raises UserError, on the thread that prepares the prompt, if the task that asked is gone."""
        if self.is_gone:
            raise UserError("the task that asked was cancelled before its prompt was ready")

    def give(self, chunk: StreamChunk | None) -> None:
        """From any thread. If the loop has ended, so has the reader."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.queue.put_nowait, chunk)


class AsyncLLM:
    """`LLM` for many tasks, of one event loop or several; takes the same options.

    Making it takes as long as loading the model does. `llm` is the model itself, and may be used from threads at the
    same time: `await asyncio.to_thread(async_llm.llm.load_document, path)`.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.llm = LLM(model, **options)
        self._streams: dict[str, _Stream] = {}
        self._thread = threading.Thread(target=self._run, name="firstlight-engine", daemon=True)
        self._thread.start()

    async def add(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        *,
        document: Document | None = None,
        tools: Tools | None = None,
        template_kwargs: Names = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> str:
        """Queue a text, ids or a conversation, or a question about a document. Returns the name to stream it by.

        With `n` the stream has the chunks of all answers as they come, told apart by `index`. Raises UserError like
        `LLM.stream`. A task that is cancelled in here leaves no request behind.
        """
        stream = _Stream(asyncio.get_running_loop())
        terms: dict[str, Any] = {"priority": priority, "ttft_slo_s": ttft_slo_s}
        encode: Encode = partial(self.llm.encoder.prompt, prompt, tools, template_kwargs)
        if document is not None:
            encode, terms["known"] = document.asking(prompt, template_kwargs)
        try:
            return await asyncio.to_thread(self._enter, stream, encode, params or SamplingParams(), terms)
        except asyncio.CancelledError:
            stream.is_gone = True
            self._leave(stream)
            raise

    async def stream(self, rid: str) -> AsyncIterator[StreamChunk]:
        """What was asked for, piece by piece; an answer's last chunk has its completion. Leaving early aborts."""
        stream = self._streams.get(rid)
        if stream is None or stream.is_read:
            raise UserError(f"no unread answer is called {rid!r}; `add` gives the names, and each is read once")
        stream.is_read, left = True, len(stream.rids)
        try:
            while left:
                if (chunk := await stream.queue.get()) is None:
                    raise UserError("the model was closed before the answer was complete")
                left -= chunk.completion is not None
                yield chunk
        finally:
            self._leave(stream)

    def abort(self, rid: str) -> None:
        """End an answer: its stream gets one more chunk, with what there is. Unknown and finished ones are ignored."""
        for each in self._streams[rid].rids if rid in self._streams else ():
            self.llm.engine.cancel(each)

    async def close(self) -> None:
        """End every answer and the engine's thread, free everything."""
        await asyncio.to_thread(self._shut)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _enter(self, stream: _Stream, encode: Encode, params: SamplingParams, terms: dict[str, Any]) -> str:
        """On a thread: tokenise and queue. Meanwhile the task may leave, or the engine end: neither may be missed."""
        stream.rids = self.llm.answers.add(encode, params, give=stream.give, check=stream.check, **terms)
        self._streams[stream.rids[0]] = stream
        if stream.is_gone:
            self._leave(stream)
        if self.llm.answers.turns.is_over:
            stream.give(None)
        return stream.rids[0]

    def _leave(self, stream: _Stream) -> None:
        """Nobody reads this any more."""
        for rid in stream.rids:
            self._streams.pop(rid, None)
            self.llm.answers.forget(rid)

    def _run(self) -> None:
        """The engine's thread. A pass that fails ends its own requests; a second failure in a row ends everything."""
        failures = 0
        while failures < 2 and self.llm.answers.turns.wait_for_work():
            try:
                self.llm.answers.turns.step()
                failures = 0
            except Exception:
                log.exception("a step of the engine failed")
                failures += 1
        self.llm.answers.turns.is_over = True
        for stream in list(self._streams.values()):
            stream.give(None)

    def _shut(self) -> None:
        for rid in list(self._streams):
            self.abort(rid)  # else a long step would go on to its end
        self.llm.close()
        self._thread.join()
