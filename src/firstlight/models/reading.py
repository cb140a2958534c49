"""From what a model file says to a `ModelConfig`: GGUF metadata or a Hugging Face config.json.

A setting that the layer math doesn't implement is refused by name instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from firstlight.core.errors import UserError
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Settings
from firstlight.models.families import FAMILIES, family_name
from firstlight.models.fields import Fields
from firstlight.models.rope import stretched_context

ROPE_TENSORS = {"rope_freqs": "factors", "rope_factors_long": "long_factor", "rope_factors_short": "short_factor"}
"""GGUF tensors that hold RoPE divisors, one for each pair, and the setting that they become."""


def config_from_gguf(
    metadata: Mapping[str, Any], *, tie_head: bool, divisors: Mapping[str, Sequence[float]] | None = None
) -> ModelConfig:
    """The config of a GGUF file's metadata.

    A GGUF file says `tie_head` only by holding no output.weight, and RoPE `divisors` (keys: ROPE_TENSORS' values) by
    tensors.
    """
    stated = metadata.get("general.architecture")
    family = FAMILIES[arch := family_name(stated)]
    f = Fields({key.removeprefix(f"{stated}."): value for key, value in metadata.items()})
    heads, hidden = f.integer("attention.head_count"), f.integer("embedding_length")
    head_dim = f.integer("attention.key_length", hidden // max(heads, 1))
    if f.integer("rope.dimension_count", head_dim) != head_dim:
        raise UserError("this model rotates only a part of each head, which is not supported; use another model")
    if f.integer("attention.value_length", head_dim) != head_dim:
        raise UserError("keys and values of different sizes are not supported; use another model")
    scaling = _gguf_scaling(f, dict(divisors or {}))
    common: Settings = {
        "architecture": arch,
        "num_layers": f.integer("block_count"),
        "hidden_size": hidden,
        "intermediate_size": f.integer("feed_forward_length"),
        "num_heads": heads,
        "num_kv_heads": f.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": f.integer("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        "rms_eps": f.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": f.real("rope.freq_base", 10000.0),
        "max_context": stretched_context(f.integer("context_length"), scaling),
        "tie_head": tie_head,
        "rope_scaling": scaling,
    }
    return ModelConfig(**(common | family.gguf_settings(f)))


def _gguf_scaling(f: Fields, divisors: dict[str, Sequence[float]]) -> dict[str, Any] | None:
    kind = f.values.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "factors", **divisors} if divisors else None
    renamed = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    given = {name: f.values[f"rope.scaling.{key}"] for key, name in renamed.items() if f.has(f"rope.scaling.{key}")}
    if kind == "yarn":
        given.pop("attention_factor", None)  # in a GGUF file it comes on top of what the factor implies, as 1
    return {"rope_type": kind, **given, **divisors}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face config.json (old `rope_theta`/`rope_scaling` or newer `rope_parameters`)."""
    family = FAMILIES[arch := family_name(config.get("model_type"))]
    f = Fields(config)
    heads, hidden = f.integer("num_attention_heads"), f.integer("hidden_size")
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        raise UserError(f"activation {activation!r} is not supported ({family.activation} is); use another model")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError("linears with a bias are not supported in this family; use a model without biases")
    rope = f.mapping("rope_parameters")
    scaling = _hf_scaling(f.mapping("rope_scaling") or rope, f)
    common: Settings = {
        "architecture": arch,
        "num_layers": f.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "intermediate_size": f.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": f.integer("num_key_value_heads", heads),
        "head_dim": f.integer("head_dim", hidden // max(heads, 1)),
        "vocab_size": f.integer("vocab_size"),
        "rms_eps": f.real("rms_norm_eps", 1e-6),
        "rope_theta": Fields(rope).real("rope_theta", f.real("rope_theta", 10000.0)),
        "max_context": stretched_context(f.integer("max_position_embeddings", 2048), scaling),
        "tie_head": f.flag("tie_word_embeddings", family.tied),
        "rope_scaling": scaling,
    }
    return ModelConfig(**(common | family.hf_settings(f)))


def _hf_scaling(rope: Mapping[str, Any], f: Fields) -> dict[str, Any] | None:
    """The scaling's settings; some configs say the original length outside."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    original = "original_max_position_embeddings"
    outside = {original: f.integer(original)} if f.has(original) else {}
    return {**outside, **rope, "rope_type": kind}
