"""OpenVINO GenAI, which reads GGUF files itself: stateful attention on whole prompts, or paged attention in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGES = ("openvino_genai",)


class Engine:
    exact = None

    def __init__(self, job: dict[str, Any]) -> None:
        import numpy
        import openvino
        import openvino_genai as genai

        self._numpy, self._openvino, self._genai = numpy, openvino, genai
        self.version = genai.__version__
        settings = job["settings"]
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": job["threads"],
            "ATTENTION_BACKEND": settings["attention"],
        }
        if settings["attention"] == "PA":
            properties["scheduler_config"] = self._scheduler(settings["chunk"] or job["max_len"], job["max_len"])
        if job["exact"]:
            kept = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
            properties |= dict.fromkeys(kept, settings["precision"]) | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        self._pipe = genai.LLMPipeline(job["model"], "CPU", **properties)

    def _scheduler(self, chunk: int, max_len: int) -> Any:
        config = self._genai.SchedulerConfig()
        config.max_num_batched_tokens = chunk
        config.enable_prefix_caching = False
        config.num_kv_blocks = max_len // 16  # a block of paged attention holds at least 16 tokens on CPU
        return config

    def generate(self, ids: list[int], num_tokens: int, tell: Callable[[int], None]) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        config.apply_chat_template = False
        prompt = self._openvino.Tensor(self._numpy.array([ids], dtype=self._numpy.int64))
        self._pipe.generate(prompt, config, self._streamer(tell))

    def _streamer(self, tell: Callable[[int], None]) -> Any:
        status = self._genai.StreamingStatus.RUNNING

        class Streamer(self._genai.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, tokens: int | list[int]) -> Any:
                for token in [tokens] if isinstance(tokens, int) else tokens:
                    tell(token)
                return status

            def end(self) -> None:
                pass

        return Streamer()


def open_engine(job: dict[str, Any]) -> Engine:
    return Engine(job)
