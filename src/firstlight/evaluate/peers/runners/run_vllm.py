"""vLLM's CPU build inside this process: prompts of ids straight into its engine, one step at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Engine:
    exact = None

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(job["threads"]),
            "VLLM_CACHE_ROOT": job["cache"],
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        self.version, self._params, self._count = vllm.__version__, vllm.SamplingParams, 0
        self._engine = vllm.LLM(
            job["model"],
            dtype=job["settings"]["dtype"],
            skip_tokenizer_init=True,
            max_model_len=job["max_len"],
            max_num_seqs=1,
            max_num_batched_tokens=min(job["settings"]["chunk"] or job["max_len"], job["max_len"]),
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine

    def generate(self, ids: list[int], num_tokens: int, tell: Callable[[int], None]) -> None:
        params = self._params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._count += 1
        self._engine.add_request(str(self._count), {"prompt_token_ids": ids}, params)
        told = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                for token in output.outputs[0].token_ids[told:]:
                    told += 1
                    tell(token)


def open_engine(job: dict[str, Any]) -> Engine:
    return Engine(job)
