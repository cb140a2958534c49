"""What a model file says about its architecture, in one frozen record for the layer math, the pool and the planners.

It is made from GGUF metadata or from a Hugging Face config.json; both are untrusted, so every field is checked here and
a setting that the layer math does not implement is refused by name instead of being ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from firstlight.core.errors import UserError

ARCHITECTURES = ("llama",)
_MAX_LAYERS = 4096


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
    attention_bias: bool = False

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
        if not all(math.isfinite(value) and value > 0 for value in (self.rms_eps, self.rope_theta)):
            raise UserError("the model's RMS epsilon or RoPE base is not a positive number; fetch the model again")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type", "unknown")
            raise UserError(f"RoPE scaling {kind!r} is not supported yet; use a model without RoPE scaling")
        if self.attention_bias:
            raise UserError("linears with a bias are not supported yet; use a model without biases")

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token keeps, all layers, at `dtype_bytes` an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes


def config_from_gguf(metadata: Mapping[str, Any], *, tie_head: bool) -> ModelConfig:
    """The config of a GGUF file's metadata. A GGUF file says `tie_head` only by holding no output.weight."""
    arch = _known(metadata.get("general.architecture"))
    fields = _Fields({key.removeprefix(f"{arch}."): value for key, value in metadata.items()})
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // max(heads, 1))
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise UserError("this model rotates only a part of each head, which is not supported; use another model")
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UserError("keys and values of different sizes are not supported; use another model")
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    return ModelConfig(
        architecture=arch,
        num_layers=fields.integer("block_count"),
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        rms_eps=fields.real("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.real("rope.freq_base", 10000.0),
        max_context=fields.integer("context_length"),
        tie_head=tie_head,
        rope_scaling=None if scaling == "none" else {"rope_type": scaling},
    )


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face config.json (old `rope_theta`/`rope_scaling` or newer `rope_parameters`)."""
    arch = _known(config.get("model_type"))
    fields = _Fields(config)
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"activation {config['hidden_act']!r} is not supported (silu is); use another model")
    rope = fields.mapping("rope_parameters")
    theta = _Fields(rope).real("rope_theta", fields.real("rope_theta", 10000.0))
    return ModelConfig(
        architecture=arch,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
        vocab_size=fields.integer("vocab_size"),
        rms_eps=fields.real("rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_context=fields.integer("max_position_embeddings", 2048),
        tie_head=bool(config.get("tie_word_embeddings", False)),
        rope_scaling=_scaling(fields.mapping("rope_scaling") or rope),
        attention_bias=bool(config.get("attention_bias") or config.get("mlp_bias")),
    )


def _known(arch: Any) -> str:
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"architecture {arch!r} is not supported; use a model of a supported one ({known})")
    return str(arch)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return None if kind == "default" else {**rope, "rope_type": kind}


class _Fields:
    """Typed reads of untrusted key-values; a missing or wrong one is named."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"the model's {key} is {_shown(value)}, a whole number is needed; use another model file")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"the model's {key} is {_shown(value)}, a number is needed; use another model file")
        return float(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"the model's {key} is {_shown(value)}, an object is needed; use another model file")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"the model file does not say its {key}; use another model file")
        return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 40 else f"a {type(value).__name__}"
