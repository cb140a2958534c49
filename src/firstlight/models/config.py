"""What a model file says about its architecture, in one frozen record for the layer math, the pool and the planners.

`models/reading.py` makes it from GGUF metadata or from a Hugging Face config.json; both are untrusted, so every field
is checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.models.rope import rope_table

_MAX_LAYERS = 4096
_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model.

    A linear's weight is [out, in]: q is [num_heads * head_dim, hidden_size], k and v are [num_kv_heads * head_dim,
    hidden_size]. `max_context` is in tokens. `tie_head` says that the head is the embedding.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    max_context: int
    tie_head: bool
    rope_scaling: dict[str, Any] | None = None
    """Settings under Hugging Face's names, `rope_type` among them; of layers without a RoPE base of their own."""
    window: int | None = None
    """Tokens that a row of a local layer reads, its own included."""
    local_layers: tuple[int, ...] = ()
    """Layers that read the window only."""
    local_rope_theta: float | None = None
    """RoPE base of local layers, unscaled; None = as the others."""
    score_scale: float | None = None
    """What scores are multiplied by; None = 1 / sqrt(head_dim)."""
    score_cap: float | None = None
    """Soft cap on scores; None = none."""
    logit_cap: float | None = None
    """Logits are bent into (-cap, cap)."""
    num_experts: int = 0
    """Experts of each MLP, of `intermediate_size` each; 0 = a dense MLP."""
    num_experts_used: int = 0
    """Experts that a row goes through."""
    norm_expert_weights: bool = True
    """Whether the weights of a row's experts sum to 1."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"the model's {name} is {getattr(self, name)}; the file is damaged, fetch it again")
        if self.num_layers > _MAX_LAYERS or self.max_context < 1:
            raise UserError("the model's number of layers or context length is impossible; fetch the file again")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads; fetch the model again")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head dimension {self.head_dim} cannot be rotated; fetch the model again")
        bases = (self.rope_theta, self.local_rope_theta or 1.0)
        if not all(math.isfinite(value) and value > 0 for value in (self.rms_eps, *bases)):
            raise UserError("the model's RMS epsilon or RoPE base is not a positive number; fetch the model again")
        if not all(math.isfinite(value) and value > 0 for value in (self.score_scale or 1.0, self.logit_cap or 1.0)):
            raise UserError("the model's scale or cap is not a positive number; fetch the model again")
        if self.local_layers and (self.window is None or self.window < 1):
            raise UserError(f"the model's window is {self.window}; the file is damaged, fetch it again")
        if not 0 <= self.num_experts_used <= self.num_experts <= _MAX_EXPERTS or (
            self.num_experts and not self.num_experts_used
        ):
            raise UserError("the model's number of experts is impossible; fetch the file again")
        rope_table(self.head_dim, self.rope_theta, self.rope_scaling, self.max_context, self.max_context)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; None = reads all."""
        local = set(self.local_layers)
        return tuple(self.window if layer in local else None for layer in range(self.num_layers))

    def facts(self, digest: str, machine: str = "", max_len: int | None = None) -> ModelFacts:
        """What parts of methods may know; `digest` is the sha256 of the model's files."""
        return ModelFacts(
            digest,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.windows,
            machine,
            max_len or self.max_context,
        )

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token keeps, all layers, at `dtype_bytes` an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes
