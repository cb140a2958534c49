"""The llama family: SmolLM2, Llama 2 and 3, Mistral. Layer math on blocks of rows; the executor owns the loop.

A layer is two halves around attention: `qkv` (norm, projections, rotation) and `finish` (output projection, MLP). Both
are row-local: a row's result doesn't depend on the rows beside it. The residual stream is float32 whatever the compute
type: sixty roundings to bf16 cost half of its distance to a float32 run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from firstlight.models.config import ModelConfig


class Llama:
    """Weights packed for a backend, and the halves of a layer.

    Shapes: n rows, D hidden, Hq / Hkv heads of d. Weights come under Hugging Face's names, [out, in].
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], backend: ModuleType) -> None:
        self.config, self.ops = config, backend
        self.scale = 1 / math.sqrt(config.head_dim)
        self.embedding = weights["model.embed_tokens.weight"]
        self.dtype = self.embedding.dtype
        self.final_gain = weights["model.norm.weight"].float()
        self._gains = [
            tuple(weights[f"model.layers.{i}.{name}.weight"].float() for name in _NORMS)
            for i in range(config.num_layers)
        ]
        self.linears = backend.PackedLinears(_fused(config, weights))
        self._head_rows = weights[_head_name(config)]
        half = config.head_dim // 2
        self._frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        self.row_flops = 2.0 * sum(math.prod(s) for name, s in self.linears.shapes.items() if name != "head")
        """Operations of all linears for one row, the head apart."""
        self.layer_flops = self.row_flops / config.num_layers

    def embed(self, ids: Tensor) -> Tensor:
        """ids i64 [n] -> residual rows f32 [n, D]."""
        return self.embedding[ids].float()

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos i64 [n] -> cos, sin f32 [n, d], sin negative in the first half; angles in float64, exact however far."""
        angle = pos[:, None].double() * self._frequencies
        cos, sin = angle.cos().float(), angle.sin().float()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def qkv(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x f32 [n, D] -> rotated q [n, Hq, d], rotated k [n, Hkv, d], v [n, Hkv, d]."""
        c = self.config
        h = self.ops.add_norm(x, None, self._gains[layer][0], c.rms_eps, self.dtype)
        heads = self.linears(f"{layer}.qkv", h).view(len(x), -1, c.head_dim)
        turned = self.ops.rotate(heads[:, : c.num_heads + c.num_kv_heads], cos, sin)
        return turned[:, : c.num_heads], turned[:, c.num_heads :], heads[:, c.num_heads + c.num_kv_heads :]

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> None:
        """x f32 [n, D] += output projection of attended [n, Hq, d], then += the MLP: in place."""
        o = self.linears(f"{layer}.o", attended.flatten(1))
        h = self.ops.add_norm(x, o, self._gains[layer][1], self.config.rms_eps, self.dtype)
        gated = self.ops.silu_mul(self.linears(f"{layer}.gate_up", h))
        x.add_(self.linears(f"{layer}.down", gated))

    def head(self, x: Tensor) -> Tensor:
        """x f32 [n, D] -> logits f32 [n, vocabulary]."""
        h = self.ops.add_norm(x, None, self.final_gain, self.config.rms_eps, self.dtype)
        logits: Tensor = self.linears("head", h).float()
        return logits if self.dtype == torch.float32 else self._rescored(h, logits)

    def _rescored(self, h: Tensor, logits: Tensor) -> Tensor:
        """A bf16 logit of 25 is off by up to 0.06, which ties the likeliest tokens: theirs are made anew in float32."""
        best = logits.topk(_RESCORED, dim=-1).indices
        rows = self._head_rows[best].float()
        return logits.scatter_(1, best, torch.mul(rows, h.float()[:, None]).sum(-1))


_RESCORED = 64
"""Tokens a row whose logits are made in float32."""
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _fused(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linears by short names, those that share an input joined: fewer calls, wider products."""
    fused = {"head": weights[_head_name(config)]}
    for i in range(config.num_layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        fused[f"{i}.qkv"] = torch.cat([weights[f"{attn}.{p}_proj.weight"] for p in "qkv"])
        fused[f"{i}.o"] = weights[f"{attn}.o_proj.weight"]
        fused[f"{i}.gate_up"] = torch.cat([weights[f"{mlp}.{p}_proj.weight"] for p in ("gate", "up")])
        fused[f"{i}.down"] = weights[f"{mlp}.down_proj.weight"]
    return fused


def _head_name(config: ModelConfig) -> str:
    return "model.embed_tokens.weight" if config.tie_head else "lm_head.weight"
