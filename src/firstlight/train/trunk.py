"""A model's layers in plain differentiable PyTorch: what trainings run, since the engine's operators know no gradients.

Off the path of a prompt. It reads the same weights, by the same names, and gives the engine's hidden rows up to
rounding. The weights are frozen: gradients flow through rows only, so a linear keeps nothing for its way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from firstlight.core.errors import UserError
from firstlight.models.config import ModelConfig
from firstlight.models.rope import rope_table

FAMILIES = ("llama", "qwen2", "qwen3")
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""layer, q [1, Hq, N, d], k and v [1, Hkv, N, d] -> [1, Hq, N, d]."""

_KEPT_NBYTES = 4 << 30
"""Beyond this much memory for the way back, layers are computed again instead."""


class Trunk:
    """Embedding, layers and final norm of one model; attention is the caller's."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        """Weights under Hugging Face's names, in float32 or bfloat16. UserError for families that it can't run."""
        if config.architecture not in FAMILIES or config.local_layers:
            raise UserError(
                f"training runs models of {', '.join(FAMILIES)} whose layers read all of the context, and this one "
                f"is {config.architecture}; choose another model"
            )
        self.config, self._weights = config, weights
        self.dtype = weights["model.embed_tokens.weight"].dtype
        self.scale = config.score_scale or 1 / math.sqrt(config.head_dim)

    def hidden(self, ids: Tensor, attend: Attention) -> Tensor:
        """ids i64 [N] -> the head's input f32 [N, D] of every row."""
        x = self._weights["model.embed_tokens.weight"][ids].float()
        cos, sin = self._rope(len(ids))
        again = torch.is_grad_enabled() and self._kept_nbytes(len(ids)) > _KEPT_NBYTES
        for layer in range(self.config.num_layers):
            if again:
                x = checkpoint(self._layer, layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = self._layer(layer, x, cos, sin, attend)
        return self._norm("model.norm", x)

    def dense(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The model's own attention."""
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)

    def _layer(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attention) -> Tensor:
        """x f32 [N, D] -> [N, D]."""
        name, c = f"model.layers.{layer}.", self.config
        h = self._norm(f"{name}input_layernorm", x)
        q = self._heads(f"{name}self_attn.q", h, c.num_heads)
        k = self._heads(f"{name}self_attn.k", h, c.num_kv_heads)
        v = self._heads(f"{name}self_attn.v", h, c.num_kv_heads)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        attended = attend(layer, q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        x = x + self._linear(f"{name}self_attn.o_proj", attended)
        h = self._norm(f"{name}post_attention_layernorm", x)
        gated = silu(self._linear(f"{name}mlp.gate_proj", h)) * self._linear(f"{name}mlp.up_proj", h)
        return x + self._linear(f"{name}mlp.down_proj", gated)

    def _heads(self, name: str, h: Tensor, heads: int) -> Tensor:
        """h [N, D] -> [heads, N, d], normed where the family does that."""
        made = self._linear(f"{name}_proj", h).view(len(h), heads, -1).transpose(0, 1)
        return self._norm(f"{name}_norm", made) if f"{name}_norm.weight" in self._weights else made

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self._weights.get(f"{name}.bias")
        return linear(x.to(self.dtype), self._weights[f"{name}.weight"], None if bias is None else bias.to(self.dtype))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gain = self._weights[f"{name}.weight"].float()
        return rms_norm(x.float(), gain.shape, gain, self.config.rms_eps)

    def _rope(self, rows: int) -> tuple[Tensor, Tensor]:
        """cos, sin f32 [N, d], both halves alike."""
        c = self.config
        frequencies, gain = rope_table(c.head_dim, c.rope_theta, c.rope_scaling, c.max_context, c.max_context)
        angle = (torch.arange(rows)[:, None].double() * frequencies).repeat(1, 2)
        return (angle.cos() * gain).float(), (angle.sin() * gain).float()

    def _kept_nbytes(self, rows: int) -> int:
        """What autograd keeps of all layers at most, in bytes."""
        c = self.config
        wide = 4 * c.intermediate_size + 4 * (c.num_heads + c.num_kv_heads) * c.head_dim
        return rows * c.num_layers * (wide * self.dtype.itemsize + 6 * c.hidden_size * 4)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [H, N, d], turned in float32."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x.float() * cos + turned * sin).to(x.dtype)
