"""Logits and greedy tokens beside transformers, on the real model and real text.

The weights themselves are judged elsewhere (against the quantisation library); here transformers' layers get ours.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from firstlight.core.request import Request, SamplingParams
from firstlight.llm import LLM
from firstlight.models.weights.checkpoint import open_checkpoint

T = 512


@pytest.fixture(scope="module")
def ids(smollm2_path: Path) -> list[int]:
    folder = resources.files("firstlight.evaluate") / "texts"
    text = next(f for f in folder.iterdir() if f.name.endswith(".txt")).read_text()
    with LLM(smollm2_path, max_num_seqs=1, max_model_len=600) as llm:
        return llm.encode(text)[:T]


def ours(path: Path, precision: str, ids: list[int], new: int) -> tuple[torch.Tensor, list[int]]:
    with LLM(path, precision=precision, max_num_seqs=1, max_model_len=600) as llm:
        logits = torch.full((T, llm.config.vocab_size), torch.nan)
        sink = lambda tok, block: logits.index_copy_(0, tok, block)  # noqa: E731
        sampling = SamplingParams(max_tokens=new, ignore_eos=True)
        llm.engine.add(Request("r", ids, sampling, logits_at="all", logits_sink=sink))
        tokens: list[int] = []
        while llm.engine.has_work:
            tokens += [i for out in llm.engine.step() for i in out.new_ids]
    return logits, tokens


@pytest.fixture(scope="module")
def f32(smollm2_path: Path, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    return ours(smollm2_path, "f32", ids, 64)


@torch.inference_mode()
def test_float32_equals_transformers(smollm2_path: Path, ids: list[int], f32: tuple[torch.Tensor, list[int]]) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    c = checkpoint.config
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
        tie_word_embeddings=c.tie_head,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names()}, strict=False)
    logits, tokens = f32
    want = model(torch.tensor([ids])).logits[0]
    assert (logits - want).abs().max() < 2e-3
    assert torch.equal(logits.argmax(-1), want.argmax(-1))
    answer = model.generate(
        torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert tokens == answer[0, T:].tolist()


def test_bf16_is_near_float32(smollm2_path: Path, ids: list[int], f32: tuple[torch.Tensor, list[int]]) -> None:
    logits, _ = ours(smollm2_path, "bf16", ids, 1)
    p, q = f32[0].log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    print(f"KL {kl:.5f}, top-1 {(p.argmax(-1) == q.argmax(-1)).float().mean():.3f}")
    assert kl <= 2e-3


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "long", reason="takes minutes: `make test-all` runs it")
def test_weights_equal_those_that_transformers_reads(smollm2_path: Path) -> None:
    """From the same file, by their own reader: names, shapes, the order of rotated rows, every value."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    model = LlamaForCausalLM.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)
    checkpoint, theirs = open_checkpoint(smollm2_path), model.state_dict()
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), theirs[name]), name
    c, config = checkpoint.config, model.config
    assert (c.num_layers, c.num_kv_heads, c.rms_eps) == (
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.rms_norm_eps,
    )
