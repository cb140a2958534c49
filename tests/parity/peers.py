"""Tiny random models of each family as transformers makes and saves them, and as we open what it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from firstlight.core.config import Options
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.build import build_engine
from firstlight.engine.engine import Engine
from firstlight.models.weights.checkpoint import open_checkpoint

VOCABULARY = 320
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 90, "max_window_layers": 1}
_HYBRID = {"num_hidden_layers": 7, "sliding_window": 70, "query_pre_attn_scalar": 24}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_hidden_layers": 2}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_hidden_layers": 2, "sliding_window": 100}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "qwen2-window": (Qwen2Config, Qwen2ForCausalLM, {"num_hidden_layers": 3, **_QWEN_WINDOW}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_hidden_layers": 2}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_hidden_layers": 2, **_EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe-window": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_hidden_layers": 2, **_EXPERTS, "use_sliding_window": True, "sliding_window": 70},
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**_HYBRID, "tie_word_embeddings": False}),
    "gemma3-capped": (Gemma3TextConfig, Gemma3ForCausalLM, {**_HYBRID, "final_logit_softcapping": 3.0}),
}


def make(name: str, **changed: Any) -> PreTrainedModel:
    """A random model of a family; its norms and biases aren't what they are initialised to."""
    config, model, settings = FAMILIES[name]
    torch.manual_seed(3)
    made = model(config(**(_SHAPE | settings | changed))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def opened(model: PreTrainedModel, folder: Path, **options: Any) -> Engine:
    """An engine over what transformers saves, float32 unless told otherwise."""
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    given = Options(**({"precision": "f32", "max_num_seqs": 2} | options))
    dtype = torch.float32 if given.precision == "f32" else torch.bfloat16
    names = checkpoint.names()
    tensors = {n: t.to(torch.float32 if t.dim() == 1 else dtype) for n in names for t in [checkpoint.tensor(n)]}
    return build_engine(checkpoint.config, tensors, given, "tiny")


def run(engine: Engine, ids: list[int], new: int) -> tuple[torch.Tensor, list[int]]:
    """Prompt logits [T, vocabulary], streamed in blocks, and the greedy answer."""
    logits = torch.full((len(ids), VOCABULARY), torch.nan)

    def sink(tok: torch.Tensor, block: torch.Tensor) -> None:
        assert len(tok) <= 256, "prompt logits come in row blocks"
        logits[tok] = block

    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    engine.add(Request("r", ids, sampling, logits_at="all", logits_sink=sink))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [i for out in engine.step() for i in out.new_ids]
    return logits, tokens


def prompt(length: int) -> list[int]:
    ids: list[int] = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return ids


@torch.inference_mode()
def answer(model: PreTrainedModel, ids: list[int], new: int) -> list[int]:
    """transformers' greedy answer."""
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)  # or else it takes a padding token for padding
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
    tokens: list[int] = model.generate(prompt, attention_mask=mask, **how)[0, len(ids) :].tolist()
    return tokens
