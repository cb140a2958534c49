"""llama.cpp through llama-cpp-python: the prompt in large calls, cut by llama.cpp into its own `ubatch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGES = ("llama_cpp",)
_BATCH = 2048
"""Tokens of a call, if a `ubatch` isn't more: the binding keeps memory for the logits of all of them."""
_KV = {"f16": 1, "bf16": 30}  # ggml's numbers of the types


class Engine:
    exact = None

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self.version = llama_cpp.__version__
        settings, whole = job["settings"], job["max_len"]
        ubatch = min(settings["ubatch"] or whole, whole)
        kv = _KV[settings["kv"]]
        self._llama = llama_cpp.Llama(
            job["model"],
            n_ctx=whole,
            n_batch=min(max(ubatch, _BATCH), whole),
            n_ubatch=ubatch,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            flash_attn=settings["flash"],
            type_k=kv,
            type_v=kv,
            verbose=False,
        )

    def generate(self, ids: list[int], num_tokens: int, tell: Callable[[int], None]) -> None:
        self._llama.reset()  # forgets every token, so the next evaluation starts from an empty cache
        for _ in range(num_tokens):
            self._llama.eval(ids)
            ids = [self._llama.sample(temp=0.0)]
            tell(ids[0])


def open_engine(job: dict[str, Any]) -> Engine:
    return Engine(job)
