"""Qwen 3 (arXiv 2505.09388): each head of q and k is normed before it is turned."""

from __future__ import annotations

from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder, LayerTensors, Settings
from firstlight.models.fields import Fields
from firstlight.models.qwen2 import upper_windows


class Qwen3(Decoder):
    """The shared layer math with QK norm."""

    all_kernels = True

    @classmethod
    def layer_tensors(cls, c: ModelConfig) -> LayerTensors:
        return super().layer_tensors(c) | head_norms(c)

    @classmethod
    def hf_settings(cls, f: Fields) -> Settings:
        return upper_windows(f)


def head_norms(c: ModelConfig) -> LayerTensors:
    """The gains of QK norm, one for all heads."""
    return {
        "self_attn.q_norm.weight": ("attn_q_norm.weight", (c.head_dim,)),
        "self_attn.k_norm.weight": ("attn_k_norm.weight", (c.head_dim,)),
    }
