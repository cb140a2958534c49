"""Logits and greedy tokens beside transformers, on a tiny random model."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from firstlight.core.request import Request, SamplingParams
from firstlight.engine.engine import Engine
from tests.tiny import VOCABULARY, tiny_config, tiny_engine, tiny_weights


def peer() -> LlamaForCausalLM:
    c = tiny_config()
    config = LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_context,
        rms_norm_eps=c.rms_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(tiny_weights(), strict=False)
    return model


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


@torch.inference_mode()
def test_every_position_and_64_greedy_tokens_equal_transformers() -> None:
    ids = torch.randint(VOCABULARY, (512,), generator=torch.Generator().manual_seed(1)).tolist()
    model = peer()
    logits, tokens = run(tiny_engine(), ids, 64)
    want = model(torch.tensor([ids])).logits[0]
    assert (logits - want).abs().max() < 2e-3
    assert torch.equal(logits.argmax(-1), want.argmax(-1))
    answer = model.generate(
        torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert tokens == answer[0, len(ids) :].tolist()
