"""Qwen 3 with a mixture of experts (arXiv 2505.09388): a row goes through a few of many small MLPs.

Which ones is the row's own business: its router scores decide, and its experts' outputs are summed in the experts'
order, so the rows beside it change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import LayerTensors, Rows, Settings, Weight, attention_linears
from firstlight.models.fields import Fields
from firstlight.models.qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """Qwen 3 with E experts in each layer, all in one tensor: E first."""

    all_kernels = False

    @classmethod
    def layer_tensors(cls, c: ModelConfig) -> LayerTensors:
        hidden, ffn, experts = c.hidden_size, c.intermediate_size, c.num_experts
        dense = {name: tensor for name, tensor in super().layer_tensors(c).items() if not name.startswith("mlp.")}
        sparse: LayerTensors = {
            "mlp.gate.weight": ("ffn_gate_inp.weight", (experts, hidden)),
            "mlp.experts.gate_proj.weight": ("ffn_gate_exps.weight", (experts, ffn, hidden)),
            "mlp.experts.up_proj.weight": ("ffn_up_exps.weight", (experts, ffn, hidden)),
            "mlp.experts.down_proj.weight": ("ffn_down_exps.weight", (experts, hidden, ffn)),
        }
        return dense | sparse

    @classmethod
    def hf_settings(cls, f: Fields) -> Settings:
        if f.integer("decoder_sparse_step", 1) != 1 or f.values.get("mlp_only_layers"):
            raise UserError("a mixture of experts in some layers only is not supported; use another model")
        num_experts = "num_experts" if f.has("num_experts") else "num_local_experts"
        # A window is for all layers here, where there is one.
        window = {"max_window_layers": 0}
        return Qwen3.hf_settings(Fields({**f.values, **window})) | {
            "intermediate_size": f.integer("moe_intermediate_size"),
            "num_experts": f.integer(num_experts),
            "num_experts_used": f.integer("num_experts_per_tok"),
            "norm_expert_weights": f.flag("norm_topk_prob", False),
        }

    @classmethod
    def gguf_settings(cls, f: Fields) -> Settings:
        return {
            "intermediate_size": f.integer("expert_feed_forward_length"),
            "num_experts": f.integer("expert_count"),
            "num_experts_used": f.integer("expert_used_count"),
        }

    @classmethod
    def _linears(cls, layer: Mapping[str, Weight]) -> dict[str, list[Weight]]:
        gate, up, down = (layer[f"mlp.experts.{p}_proj.weight"] for p in ("gate", "up", "down"))
        linears = attention_linears(layer) | {"router": [layer["mlp.gate.weight"]]}
        for expert in range(len(down)):
            linears[f"{expert}.gate_up"] = [gate[expert], up[expert]]
            linears[f"{expert}.down"] = [down[expert]]
        return linears

    def _mlp(self, layer: int, h: Rows) -> tuple[Tensor, None]:
        assert isinstance(h, Tensor)  # the router reads it too
        weight, chosen = self._route(layer, h)
        out = torch.zeros(h.shape)
        for expert in sorted(set(chosen.flatten().tolist())):
            row, place = torch.where(chosen == expert)
            gated = self._gated(self.linears(f"{layer}.{expert}.gate_up", h[row]))
            made = self.linears(f"{layer}.{expert}.down", gated)
            out.index_add_(0, row, made.float() * weight[row, place, None])
        return out, None

    def _route(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [n, D] -> weights f32 [n, k] and numbers i64 [n, k] of each row's experts."""
        share = torch.softmax(self.linears(f"{layer}.router", h).float(), -1)
        weight, chosen = share.topk(self.config.num_experts_used, dim=-1)
        return (weight / weight.sum(-1, keepdim=True) if self.config.norm_expert_weights else weight), chosen

    def _used(self, name: str) -> float:
        used = self.config.num_experts_used / self.config.num_experts
        return used if name.count(".") == 2 else super()._used(name)
