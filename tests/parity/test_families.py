"""Every family beside transformers on a tiny random model, through the files that transformers saves."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

from firstlight.core.errors import UserError
from firstlight.models.weights.checkpoint import open_checkpoint
from tests.parity.peers import FAMILIES, answer, make, opened, prompt, run

ORIGINAL = 128
"""The context that scaled models were trained for, so to say; prompts here are three times as long."""
SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn-with-everything": {
        "rope_type": "yarn",
        "factor": 6.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.9,
        "mscale_all_dim": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.0 + 0.7 * i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() < 2e-3
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_position_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    ids, model = prompt(400), make(name)
    logits, tokens = run(opened(model, tmp_path), ids, 24)
    want = model(torch.tensor([ids])).logits[0]
    assert_equal(logits, want)
    assert tokens == answer(model, ids, 24)
    # In bf16 we are no farther from float32 than transformers is, give or take what rounding happens to do.
    ours, _ = run(opened(model, tmp_path, precision="bf16"), ids, 1)
    theirs = model.to(torch.bfloat16)(torch.tensor([ids])).logits[0]
    assert (ours - want).abs().mean() < 1.3 * (theirs - want).abs().mean()


@torch.inference_mode()
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_past_the_original_length(name: str, tmp_path: Path) -> None:
    ids, model = prompt(3 * ORIGINAL), make("llama", rope_parameters=SCALINGS[name], max_position_embeddings=1024)
    logits, tokens = run(opened(model, tmp_path), ids, 16)
    assert_equal(logits, model(torch.tensor([ids])).logits[0])
    assert tokens == answer(model, ids, 16)
    plain = make("llama", rope_theta=SCALINGS[name]["rope_theta"])
    assert (plain(torch.tensor([ids])).logits[0] - logits).abs().max() > 0.1, "the scaling does nothing"


@torch.inference_mode()
def test_longrope_serves_the_original_context_with_its_short_factors(tmp_path: Path) -> None:
    """Which list is used is the engine's matter, not a prompt's: cells must not depend on what comes after them."""
    ids, model = prompt(100), make("llama", rope_parameters=SCALINGS["longrope"], max_position_embeddings=1024)
    short = run(opened(model, tmp_path, max_model_len=ORIGINAL), ids, 1)[0]
    assert_equal(short, model(torch.tensor([ids])).logits[0])
    long = run(opened(model, tmp_path), ids, 1)[0]
    assert (long - short).abs().max() > 0.01


@torch.inference_mode()
def test_scores_of_gemma3_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the cap and leaves it out of the call of its own attention, which knows what to do with it."""
    eager = modeling_gemma3.eager_attention_forward
    model = make("gemma3", attn_logit_softcapping=2.0, attn_implementation="eager")
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", partial(eager, softcap=2.0))
    ids = prompt(300)
    capped = model(torch.tensor([ids])).logits[0]
    monkeypatch.undo()
    assert (capped - model(torch.tensor([ids])).logits[0]).abs().max() > 0.01
    got, _ = run(opened(model, tmp_path), ids, 1)
    assert_equal(got, capped)


@torch.inference_mode()
def test_global_layers_of_gemma3_are_scaled_and_local_ones_are_not(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    ids, model = prompt(300), make("gemma3", rope_parameters=ropes)
    logits, _ = run(opened(model, tmp_path), ids, 1)
    assert_equal(logits, model(torch.tensor([ids])).logits[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_comes_back(name: str, tmp_path: Path) -> None:
    """Weights bit for bit, experts stacked."""
    model = make(name)
    model.save_pretrained(tmp_path)
    checkpoint, state = open_checkpoint(tmp_path), model.state_dict()
    for tensor in checkpoint.names():
        got = checkpoint.tensor(tensor)
        before, experts, which = tensor.partition(".experts.")
        if not experts:
            assert torch.equal(got, state[tensor]), tensor
        elif which == "down_proj.weight":
            assert torch.equal(got, state[f"{before}.experts.down_proj"])
        else:
            joined = state[f"{before}.experts.gate_up_proj"]
            assert torch.equal(got, joined.chunk(2, dim=1)[which == "up_proj.weight"]), tensor


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "in some layers only"),
        ("qwen3_moe", {"num_experts": 0}, "number of experts"),
        ("gemma3", {"use_bidirectional_attention": True}, "both ways"),
        ("gemma3", {"layer_types": ["odd"] * 7}, "layer_types"),
        ("gemma3", {"sliding_window": 0}, "window is 0"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is wide"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported.*yarn"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor is 0"),
        ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 numbers"),
    ],
)
def test_settings_that_cannot_be_run_are_refused_by_name(
    name: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": None, **changed}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)
