"""Each family's GGUF files: tensor names as the gguf package has them, settings, and layouts that differ from ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from firstlight.kernels.dispatch import backend
from firstlight.models.config import ModelConfig
from firstlight.models.families import FAMILIES, build_model
from firstlight.models.reading import config_from_gguf
from firstlight.models.weights.checkpoint import gguf_names, open_checkpoint, tensor_shapes

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma3": "gemma3"}
METADATA: dict[str, Any] = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 16,
    "feed_forward_length": 24,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "vocab_size": 11,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3": {"block_count": 7, "attention.sliding_window": 96},
    "qwen3_moe": {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 10},
}


def metadata(family: str, **changed: Any) -> dict[str, Any]:
    arch = ARCHITECTURES[family]
    settings = METADATA | SPECIAL.get(family, {}) | {key.replace("__", "."): value for key, value in changed.items()}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in settings.items()}


def written(path: Path, family: str, tensors: dict[str, np.ndarray], **changed: Any) -> Path:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    for key, value in metadata(family, **changed).items():
        if not isinstance(value, str):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """By GGUF name."""
    rng, names = np.random.default_rng(1), gguf_names(config)
    return {names[name]: rng.standard_normal(shape, dtype=np.float32) for name, shape in tensor_shapes(config).items()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(family: str) -> None:
    config = config_from_gguf(metadata(family), tie_head=False)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    theirs = gguf.get_tensor_name_map(arch, config.num_layers)
    for name, ours in gguf_names(config).items():
        assert theirs.get_name(name, (".weight", ".bias")) == ours


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_of_each_family_is_read(family: str, tmp_path: Path) -> None:
    tensors = random_tensors(config_from_gguf(metadata(family), tie_head=True))
    checkpoint = open_checkpoint(written(tmp_path / "m.gguf", family, tensors))
    assert checkpoint.config.architecture == family and checkpoint.config.tie_head
    for name, stored in gguf_names(checkpoint.config).items():
        value = torch.from_numpy(tensors[stored])
        if family == "gemma3" and "norm" in name:
            value = value - 1
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = torch.cat([head[i::2] for head in value.split(8) for i in (0, 1)])
        assert torch.equal(checkpoint.tensor(name), value), name


def test_what_a_gemma3_file_does_not_say() -> None:
    config = config_from_gguf(metadata("gemma3"), tie_head=True)
    assert (config.window, config.local_layers) == (96, (0, 1, 2, 3, 4, 6))
    assert (config.rope_theta, config.local_rope_theta, config.score_scale) == (1e6, 1e4, None)
    large = config_from_gguf(metadata("gemma3", block_count=62, embedding_length=5376), tie_head=True)
    assert large.score_scale == pytest.approx((5376 / 4) ** -0.5), "the 27B model's scale isn't its head dimension's"


def test_settings_of_other_families() -> None:
    moe = config_from_gguf(metadata("qwen3_moe"), tie_head=True)
    assert (moe.num_experts, moe.num_experts_used, moe.intermediate_size, moe.norm_expert_weights) == (3, 2, 10, True)
    assert all(
        config_from_gguf(metadata(f), tie_head=True).windows == (None, None) for f in ("llama", "qwen2", "qwen3")
    )
    assert set(ARCHITECTURES) | {"mistral"} == set(FAMILIES), "Mistral's GGUF files say llama"


def test_rope_divisors_are_tensors(tmp_path: Path) -> None:
    """Llama 3's scaling as GGUF files hold it: a divisor for each pair."""
    tensors = random_tensors(config_from_gguf(metadata("llama"), tie_head=True))
    divisors = np.array([1, 1.5, 4, 8], np.float32)
    path = written(tmp_path / "m.gguf", "llama", {**tensors, "rope_freqs.weight": divisors})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope_scaling == {"rope_type": "factors", "factors": divisors.tolist()}
    model = build_model(checkpoint.config, {n: checkpoint.tensor(n) for n in checkpoint.names()}, backend("torch"))
    cos, _ = model.rope(torch.tensor([5]))
    want = [math.cos(5 * 10000 ** (-i / 4) / divisors[i]) for i in range(4)]
    assert cos[0, 0, :4].tolist() == pytest.approx(want, abs=1e-6)


def test_scalings_are_settings() -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64}
    config = config_from_gguf(metadata("qwen2", **yarn), tie_head=True)
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config.max_context == 256, "four times the original length, which is more than the file's 128"
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    gemma = config_from_gguf(metadata("gemma3", **linear), tie_head=True)
    assert gemma.rope_scaling == {"rope_type": "linear", "factor": 8.0} and gemma.local_rope_theta == 1e4
    lists = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    long = {"rope__scaling__type": "longrope", "rope__scaling__original_context_length": 32}
    assert config_from_gguf(metadata("llama", **long), tie_head=True, divisors=lists).rope_scaling == {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        **lists,
    }
