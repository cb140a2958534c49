"""Qwen 2 and 2.5 (arXiv 2412.15115): q, k and v have biases, and the upper layers may read a window."""

from __future__ import annotations

from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder, LayerTensors, Settings
from firstlight.models.fields import Fields


class Qwen2(Decoder):
    """The shared layer math with biases."""

    all_kernels = True

    @classmethod
    def layer_tensors(cls, c: ModelConfig) -> LayerTensors:
        biases: LayerTensors = {
            f"self_attn.{p}_proj.bias": (f"attn_{p}.bias", (heads * c.head_dim,))
            for p, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads))
        }
        return super().layer_tensors(c) | biases

    @classmethod
    def hf_settings(cls, f: Fields) -> Settings:
        return upper_windows(f)


def upper_windows(f: Fields) -> Settings:
    """A window of the layers from `max_window_layers` on, if the config switches it on."""
    if not f.flag("use_sliding_window", False):
        return {}
    layers = range(f.integer("max_window_layers", 28), f.integer("num_hidden_layers"))
    return {"window": f.integer("sliding_window", 4096), "local_layers": tuple(layers)}
