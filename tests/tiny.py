"""A tiny random llama and its cousins, for tests of everything around the arithmetic."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from firstlight.core.config import Options
from firstlight.engine.build import build_engine
from firstlight.engine.engine import Engine
from firstlight.kernels.blocks import Stored
from firstlight.kernels.dispatch import fastest
from firstlight.models.calibration import measure
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder
from firstlight.models.families import build_model
from firstlight.models.weights.checkpoint import tensor_shapes

VOCABULARY = 320


WINDOW = 90
HYBRIDS = ("mistral", "gemma3")
"""Families whose tiny model has window layers."""


def tiny_config(num_layers: int = 2, family: str = "llama") -> ModelConfig:
    """A small model of a family; gemma3's last layer is global."""
    shape = ModelConfig(family, num_layers, 96, 192, 6, 2, 16, VOCABULARY, 1e-5, 10000.0, 8192, tie_head=True)
    layers = tuple(range(num_layers))
    special: dict[str, dict[str, Any]] = {
        "mistral": {"window": WINDOW, "local_layers": layers},
        "qwen3_moe": {"num_experts": 5, "num_experts_used": 2, "intermediate_size": 64},
        "gemma3": {
            "window": WINDOW,
            "local_layers": layers[:-1],
            "local_rope_theta": 500.0,
            "logit_cap": 20.0,
            "score_cap": 3.0,
        },
    }
    return replace(shape, **special.get(family, {}))


def tiny_weights(
    dtype: torch.dtype = torch.float32, num_layers: int = 2, family: str = "llama"
) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names."""
    generator = torch.Generator().manual_seed(5)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.randn(shape, generator=generator) * 0.12
        if len(shape) > 1:
            return made.to(dtype)
        return 1 + made if "norm" in name and family != "gemma3" else made

    shapes = tensor_shapes(tiny_config(num_layers, family))
    return {name: weight(name, shape) for name, shape in shapes.items()}


def tiny_model(
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    family: str = "llama",
    int8: bool = False,
    compact: bool = False,
) -> Decoder:
    config, weights = tiny_config(num_layers, family), tiny_weights(dtype, num_layers, family)
    if compact:
        return build_model(config, in_blocks(weights), fastest(16))
    model = build_model(config, weights, fastest(16))
    if not int8:
        return model
    known = measure(model)
    centres = [known[f"{layer}.keys"] for layer in range(num_layers)]
    return build_model(config, weights, fastest(16), int8=known, centres=centres)


def in_blocks(weights: dict[str, torch.Tensor]) -> dict[str, Stored | torch.Tensor]:
    """Linears rounded to blocks of several types, as a GGUF file would have them; of a layer's values one is left."""
    kinds = itertools.cycle(["Q4_1", "Q5_0", "Q8_0", "Q4_0", "Q5_1"])
    done: dict[str, Stored | torch.Tensor] = dict(weights)
    for name, w in weights.items():
        if w.dim() > 1 and name != "model.layers.1.self_attn.v_proj.weight":
            kind = next(kinds)
            raw = quantize(w.float().numpy(), GGMLQuantizationType[kind])
            done[name] = Stored(kind, torch.from_numpy(raw), w.dtype)
    return done


def unpacked(weights: Mapping[str, Stored | torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, as gguf unpacks them."""

    def values(w: Stored | torch.Tensor) -> torch.Tensor:
        if isinstance(w, torch.Tensor):
            return w
        return torch.from_numpy(dequantize(w.raw.numpy(), GGMLQuantizationType[w.type])).to(w.dtype)

    return {name: values(w) for name, w in weights.items()}


def tiny_engine(family: str = "llama", num_layers: int = 2, **options: Any) -> Engine:
    """An engine over the tiny model, float32 unless told otherwise."""
    given = Options(**({"precision": "f32", "max_num_seqs": 8} | options))
    dtype = torch.float32 if given.precision == "f32" else torch.bfloat16
    config, weights = tiny_config(num_layers, family), tiny_weights(dtype, num_layers, family)
    return build_engine(config, weights, given, f"tiny-{family}-{num_layers}")


def save_tiny(folder: Path, num_layers: int = 2) -> Path:
    """A random llama as a folder of files, with a tokenizer of bytes and a context of 2,048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to load

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=256, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def bytes_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if style is defined %}{{ '(' + style + ')' }}{% endif %}"
)


def save_tiny_chat(folder: Path, *, seed: int = 5, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """The tiny model as a folder of files: a tokenizer of bytes and two control tokens, and a chat template."""
    weights = tiny_weights()
    generator = torch.Generator().manual_seed(seed)
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.randn(embedding.shape, generator=generator) * 0.12
    save_file(weights, folder / "model.safetensors")
    shape = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 2048}
    config = {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder
