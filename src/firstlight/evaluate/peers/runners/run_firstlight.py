"""Our own engine, measured as the others are: in a process of its own, one request at a time, nothing known before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGES = ("firstlight.llm",)


class Engine:
    exact: bool | None = None

    def __init__(self, job: dict[str, Any]) -> None:
        import firstlight
        from firstlight.llm import LLM

        self.version = firstlight.__version__
        alone = {"prefix_cache": "off", "max_num_seqs": 1, "threads": job["threads"]}
        self._llm = LLM(job["model"], **{**job["settings"], **alone})

    def generate(self, ids: list[int], num_tokens: int, tell: Callable[[int], None]) -> None:
        from firstlight.core.request import SamplingParams

        for piece in self._llm.stream(ids, SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)):
            for token in piece.token_ids:
                tell(token)
            if piece.completion is not None:
                self.exact = piece.completion.report["exact"]


def open_engine(job: dict[str, Any]) -> Engine:
    return Engine(job)
