"""Gemma 3 (arXiv 2503.19786): five of six layers read a window and turn at a base of their own.

Norms stand before and after both halves of a layer and multiply by 1 + weight, heads of q and k are normed, embeddings
are scaled, the MLP is gated by a GELU. Text only: the vision tower of the larger ones isn't read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder, LayerTensors, Rows, Settings
from firstlight.models.fields import Fields
from firstlight.models.qwen3 import head_norms

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_LOCAL_THETA, _THETA = 10_000.0, 1_000_000.0
_PATTERN = 6
"""One layer of so many is global, unless the file says otherwise."""
_LAYERS_27B = 62
"""The one model whose scores aren't scaled by its head dimension, which GGUF files don't say."""


class Gemma3(Decoder):
    """The shared layer math with more norms around it."""

    activation = "gelu_pytorch_tanh"
    all_kernels = True
    tied = True

    @classmethod
    def layer_tensors(cls, c: ModelConfig) -> LayerTensors:
        outer: LayerTensors = {
            "post_attention_layernorm.weight": ("post_attention_norm.weight", (c.hidden_size,)),
            "pre_feedforward_layernorm.weight": ("ffn_norm.weight", (c.hidden_size,)),
            "post_feedforward_layernorm.weight": ("post_ffw_norm.weight", (c.hidden_size,)),
        }
        return super().layer_tensors(c) | outer | head_norms(c)

    @classmethod
    def hf_settings(cls, f: Fields) -> Settings:
        if f.flag("use_bidirectional_attention", False):
            raise UserError("attention both ways is not supported; use another model")
        ropes = f.mapping("rope_parameters")
        split = {kind: Fields(Fields(ropes).mapping(kind)) for kind in (_GLOBAL, _LOCAL)}
        scaling = dict(f.mapping("rope_scaling") or split[_GLOBAL].values)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        return {
            "window": f.integer("sliding_window", 4096),
            "local_layers": _local_layers(f),
            "rope_theta": split[_GLOBAL].real("rope_theta", f.real("rope_theta", _THETA)),
            "local_rope_theta": split[_LOCAL].real("rope_theta", f.real("rope_local_base_freq", _LOCAL_THETA)),
            "rope_scaling": None if kind == "default" else {**scaling, "rope_type": kind},
            "score_scale": _scale(f.real("query_pre_attn_scalar", 256.0)),
            "score_cap": f.real("attn_logit_softcapping") if f.has("attn_logit_softcapping") else None,
            "logit_cap": f.real("final_logit_softcapping") if f.has("final_logit_softcapping") else None,
        }

    @classmethod
    def gguf_settings(cls, f: Fields) -> Settings:
        layers, heads = f.integer("block_count"), f.integer("attention.head_count")
        scalar = f.integer("embedding_length") / max(heads, 1) if layers == _LAYERS_27B else None
        return {
            "window": f.integer("attention.sliding_window"),
            "local_layers": _pattern(layers, f.integer("attention.sliding_window_pattern", _PATTERN)),
            "rope_theta": f.real("rope.freq_base", _THETA),
            "local_rope_theta": f.real("rope.freq_base_swa", _LOCAL_THETA),
            "score_scale": None if scalar is None else _scale(scalar),
            "score_cap": f.real("attn_logit_softcapping") if f.has("attn_logit_softcapping") else None,
            "logit_cap": f.real("final_logit_softcapping") if f.has("final_logit_softcapping") else None,
        }

    @classmethod
    def from_gguf(cls, c: ModelConfig, name: str, values: Tensor) -> Tensor:
        return values - 1 if name.endswith("norm.weight") else values

    def __init__(self, config: ModelConfig, pieces: Mapping[str, Tensor], backend: ModuleType, **how: Any) -> None:
        super().__init__(config, pieces, backend, **how)
        # As rounded as the embeddings themselves: so the model was trained.
        self._embedding_scale = float(torch.tensor(math.sqrt(config.hidden_size), dtype=self.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * self._embedding_scale

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> None:
        o = self._norm(layer, "post_attention_layernorm", self.linears(f"{layer}.o", attended.flatten(1)))
        made = self._finished(*self._mlp(layer, self._add_norm(layer, "pre_feedforward_layernorm", "gate_up", x, o)))
        self.ops.add_rows(x, self._norm(layer, "post_feedforward_layernorm", made))

    def _gain(self, weight: Tensor) -> Tensor:
        return 1 + weight.float()

    def _gated(self, gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Rows:
        out: Rows = self.ops.gelu_mul(gate_up, scale, smooth)
        return out


def _scale(scalar: float) -> float:
    if not (math.isfinite(scalar) and scalar > 0):
        raise UserError(f"the model's query_pre_attn_scalar is {scalar}; fetch the model again")
    return 1 / math.sqrt(scalar)


def _local_layers(f: Fields) -> tuple[int, ...]:
    layers = f.integer("num_hidden_layers")
    kinds = f.values.get("layer_types")
    if kinds is None:
        return _pattern(layers, f.integer("sliding_window_pattern", _PATTERN))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {_LOCAL, _GLOBAL}:
        raise UserError(f"the model's layer_types is not a list of {layers} known kinds; fetch the model again")
    return tuple(i for i, kind in enumerate(kinds) if kind == _LOCAL)


def _pattern(layers: int, every: int) -> tuple[int, ...]:
    """All layers but one of `every`, the last of each group."""
    if every < 1:
        raise UserError(f"the model's sliding_window_pattern is {every}; fetch the model again")
    return tuple(i for i in range(layers) if (i + 1) % every)
