"""A tiny random llama, for tests of everything around the arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from firstlight.core.config import Options
from firstlight.engine.build import build_engine
from firstlight.engine.engine import Engine
from firstlight.kernels.dispatch import fastest
from firstlight.models.config import ModelConfig
from firstlight.models.families import build_model
from firstlight.models.llama import Llama

VOCABULARY = 320


def tiny_config(num_layers: int = 2) -> ModelConfig:
    return ModelConfig("llama", num_layers, 96, 192, 6, 2, 16, VOCABULARY, 1e-5, 10000.0, 8192, True)


def tiny_weights(dtype: torch.dtype = torch.float32, num_layers: int = 2) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names."""
    generator = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.12).to(dtype)

    weights = {"model.embed_tokens.weight": weight(VOCABULARY, 96), "model.norm.weight": torch.ones(96)}
    shapes = {"self_attn.q_proj": (96, 96), "self_attn.k_proj": (32, 96), "self_attn.v_proj": (32, 96)}
    shapes |= {"self_attn.o_proj": (96, 96), "mlp.gate_proj": (192, 96), "mlp.up_proj": (192, 96)}
    shapes |= {"mlp.down_proj": (96, 192)}
    for i in range(num_layers):
        weights |= {f"model.layers.{i}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = 1 + weight(96).float()
    return weights


def tiny_model(dtype: torch.dtype = torch.float32, num_layers: int = 2) -> Llama:
    return build_model(tiny_config(num_layers), tiny_weights(dtype, num_layers), fastest(16))


def tiny_engine(**options: Any) -> Engine:
    """An engine over the tiny model, float32 unless told otherwise."""
    given = Options(**({"precision": "f32", "max_num_seqs": 8} | options))
    dtype = torch.float32 if given.precision == "f32" else torch.bfloat16
    return build_engine(tiny_config(), tiny_weights(dtype), given, "tiny")


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
