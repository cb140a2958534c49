"""transformers on PyTorch: prompts in one call, or in chunks over its own cache. It unpacks a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers")


class Engine:
    exact = None

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import transformers

        self._torch, self.version = torch, transformers.__version__
        settings = job["settings"]
        self._chunk = settings["chunk"] or job["max_len"]
        torch.set_num_threads(job["threads"])
        path, packed = Path(job["model"]), {}
        if path.suffix == ".gguf":
            unpack = transformers.GgufConfig(dequantize=True)
            path, packed = path.parent, {"gguf_file": path.name, "quantization_config": unpack}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=settings["dtype"], attn_implementation=settings["attention"], **packed
        )
        self._model = model.eval()

    def generate(self, ids: list[int], num_tokens: int, tell: Callable[[int], None]) -> None:
        past: Any = None
        parts = [ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk)]
        with self._torch.inference_mode():
            while parts:
                part = self._torch.tensor([parts.pop(0)])
                out = self._model(part, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = out.past_key_values
                if not parts:
                    token = int(out.logits[0, -1].argmax())
                    tell(token)
                    num_tokens -= 1
                    parts = [[token]] if num_tokens else []


def open_engine(job: dict[str, Any]) -> Engine:
    return Engine(job)
