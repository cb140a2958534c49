"""Logits and greedy tokens of the real models of other families beside transformers, on real text.

transformers gets our weights and takes from its own defaults what a GGUF file doesn't say (gemma3's pattern of layers
and the RoPE base of local ones).
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from firstlight.core.config import Options
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.build import build_engine
from firstlight.models.weights import hub
from firstlight.models.weights.checkpoint import Checkpoint, open_checkpoint
from firstlight.models.weights.gguf import GGUFFile
from firstlight.models.weights.values import Weights

T, NEW = 512, 64
slow = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "long", reason="slow: `make test-all` runs it")
FILES = [
    pytest.param("gemma-3-270m.Q4_K_M.gguf", "▁", "\n", id="gemma3"),
    pytest.param("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "Ġ", "Ċ", id="qwen0.5", marks=slow),
    pytest.param("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "Ġ", "Ċ", id="qwen1.5", marks=slow),
]


def some_ids(path: Path, space: str, newline: str) -> list[int]:
    """Real text in the longest tokens of the vocabulary: no tokenizer's answer, but near to one."""
    metadata = GGUFFile(path).metadata
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    folder = resources.files("firstlight.evaluate") / "texts"
    text = next(f for f in folder.iterdir() if f.name.endswith(".txt")).read_text(encoding="utf-8")
    text = text.replace(" ", space).replace("\n", newline)
    found = [metadata["tokenizer.ggml.bos_token_id"]]
    while len(found) < T:
        part = next((text[:n] for n in range(24, 0, -1) if text[:n] in ids), None)
        found += [] if part is None else [ids[part]]
        text = text[len(part or "?") :]
    return found


def ours(checkpoint: Checkpoint, precision: str, ids: list[int], new: int) -> tuple[torch.Tensor, list[int]]:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    options = Options(precision=precision, max_num_seqs=1, max_model_len=T + NEW + 1)
    engine = build_engine(checkpoint.config, Weights(checkpoint, dtype), options, "real")
    logits = torch.full((T, checkpoint.config.vocab_size), torch.nan)
    sink = lambda tok, block: logits.index_copy_(0, tok, block)  # noqa: E731
    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    engine.add(Request("r", ids, sampling, logits_at="all", logits_sink=sink))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [i for out in engine.step() for i in out.new_ids]
    engine.close()
    return logits, tokens


def theirs(checkpoint: Checkpoint) -> PreTrainedModel:
    c = checkpoint.config
    sizes: dict[str, Any] = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.rms_eps,
        "tie_word_embeddings": c.tie_head,
    }
    if c.architecture == "gemma3":
        model: PreTrainedModel = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=c.window))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, rope_theta=c.rope_theta))
    model.load_state_dict(dict(Weights(checkpoint, torch.float32)), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize(("file", "space", "newline"), FILES)
def test_512_positions_and_64_greedy_tokens_equal_transformers(file: str, space: str, newline: str) -> None:
    path = hub.models_dir() / file
    if not path.is_file():
        pytest.skip(f"{file} is not here: put it into FIRSTLIGHT_MODELS")
    ids, checkpoint = some_ids(path, space, newline), open_checkpoint(path)
    logits, tokens = ours(checkpoint, "f32", ids, NEW)
    model, prompt = theirs(checkpoint), torch.tensor([ids])
    want = model(prompt).logits[0]
    assert (logits - want).abs().max() < 2e-3
    assert torch.equal(logits.argmax(-1), want.argmax(-1))
    how: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    assert tokens == answer[0, T:].tolist()
    del model, logits
    rounded = ours(checkpoint, "bf16", ids, 1)[0]
    pairs = zip(want.split(64), rounded.split(64))  # a quarter of a million tokens a row: not all rows at once
    kl = [kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1) for p, q in pairs]
    assert torch.cat(kl).mean() < 2e-3
