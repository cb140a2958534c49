"""The llama family: SmolLM2, Llama 2 and 3, and Mistral, which is a llama that reads a window."""

from __future__ import annotations

from torch import Tensor

from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder, Settings
from firstlight.models.fields import Fields


class Llama(Decoder):
    """The shared layer math and nothing else. GGUF files interleave the two halves that RoPE turns."""

    all_kernels = True

    @classmethod
    def from_gguf(cls, c: ModelConfig, name: str, values: Tensor) -> Tensor:
        if ".q_proj." in name:
            return _halves(values, c.num_heads)
        return _halves(values, c.num_kv_heads) if ".k_proj." in name else values


class Mistral(Llama):
    """Every layer reads a window, where the file says so (Mistral 7B, arXiv 2310.06825). Its GGUF files say llama."""

    @classmethod
    def hf_settings(cls, f: Fields) -> Settings:
        if not f.has("sliding_window"):
            return {}
        return {"window": f.integer("sliding_window"), "local_layers": tuple(range(f.integer("num_hidden_layers")))}


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of [num_heads * head_dim, in] from interleaved rotary pairs (GGUF) to halves (Hugging Face)."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)
