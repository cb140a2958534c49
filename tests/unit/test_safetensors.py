"""A directory as transformers saves it is the same model to us; a damaged or foreign one is refused in one line."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from firstlight.core.errors import UserError
from firstlight.models.reading import config_from_hf
from firstlight.models.weights.checkpoint import open_checkpoint

SHAPES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 11,
}
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HF = {"model_type": "llama", **SHAPES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}


def saved(path: Path, *, shard: str = "1GB", dtype: torch.dtype = torch.float32, **changed: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES, num_key_value_heads=2, max_position_embeddings=64, **changed)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_transformers_saves_comes_back(tmp_path, tied, shard, dtype):
    model = saved(tmp_path, shard=shard, dtype=dtype, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(tmp_path)
    state = model.state_dict()
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    assert set(checkpoint.names()) == state.keys() - ({"lm_head.weight"} if tied else set())
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), state[name].float()), name
    assert checkpoint.tokenizer_source == tmp_path
    assert set(checkpoint.types.values()) == {STORED[dtype]}


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_config_of_old_and_new_exports(rope):
    config = config_from_hf(HF | rope | {"head_dim": 8})
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.rope_theta, config.rms_eps, config.max_context, config.tie_head) == (5e5, 1e-5, 64, False)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (16, 24, 11)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "gpt2"}, r"architecture 'gpt2' is not supported.*\(llama, "),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "does not say its factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "does not say its low_freq_factor"),
        ({"rope_parameters": "x"}, "rope_parameters is x"),
        ({"attention_bias": True}, "bias"),
        ({"mlp_bias": True}, "bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"hidden_size": None}, "does not say its hidden_size"),
        ({"hidden_size": True}, "hidden_size is a bool"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is tiny"),
        ({"rope_theta": float("inf")}, "not a positive number"),
        ({"head_dim": 3}, "cannot be rotated"),
    ],
)
def test_configs_that_cannot_be_run_are_refused_by_name(changed, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(HF | changed)


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_incomplete_and_foreign_directories(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        open_checkpoint(tmp_path)
    saved(tmp_path, shard="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name, value = next(iter(tensors.items()))
    save_file({**tensors, "extra.weight": value.clone()}, shard)
    with pytest.raises(UserError, match=r"'extra\.weight' belongs to no supported"):
        open_checkpoint(tmp_path)
    save_file({**tensors, name: value[:1].clone()}, shard)
    with pytest.raises(UserError, match=f"{name} has shape"):
        open_checkpoint(tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard)
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="only safetensors are read"):
        open_checkpoint(tmp_path)
    edit(tmp_path / "model.safetensors.index.json", weight_map={"a": "../elsewhere.safetensors"})
    with pytest.raises(UserError, match="does not list files beside it"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_checkpoint(tmp_path)


def test_the_digest_follows_every_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))
    saved(tmp_path / "m", shard="4KB")
    seen = {open_checkpoint(tmp_path / "m").digest}
    edit(tmp_path / "m" / "config.json", note="x")
    seen.add(open_checkpoint(tmp_path / "m").digest)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    save_file({key: value + 1 for key, value in load_file(shard).items()}, shard)
    seen.add(open_checkpoint(tmp_path / "m").digest)
    assert len(seen) == 3


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("safetensors")
    saved(folder)
    return folder, (folder / "model.safetensors").read_bytes()


def attempt(folder: Path, data: bytes) -> None:
    # A new inode: the library maps the file, and an old map must not see the change.
    file = folder / "model.safetensors"
    file.unlink()
    file.write_bytes(data)
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except UserError as error:
        assert "\n" not in str(error)


anything = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused_or_whole(valid, share):
    folder, data = valid
    attempt(folder, data[: int(share * len(data))])


@anything
@given(position=st.integers(0, 1 << 20), mask=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(valid, position, mask):
    folder, data = valid
    damaged = bytearray(data)
    damaged[position % (8 + struct.unpack_from("<Q", data)[0])] ^= mask
    attempt(folder, bytes(damaged))


HUGE = [1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("where", ["header", "begin", "end", "shape"])
def test_impossible_lengths_are_refused_without_allocating(valid, number, where):
    folder, data = valid
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    entry = header["model.norm.weight"]
    if where == "shape":
        entry["shape"] = [number, number]
    elif where != "header":
        entry["data_offsets"][where == "end"] = number
    text = json.dumps(header).encode()
    damaged = struct.pack("<Q", number if where == "header" else len(text)) + text + data[8 + length :]
    tracemalloc.start()
    file = folder / "model.safetensors"
    file.unlink()
    file.write_bytes(damaged)
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 1 << 20


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    saved(tmp_path, shard="4KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(UserError, match="is in another file too"):
        open_checkpoint(tmp_path)


wrong = st.sampled_from(
    [None, [], {}, "x", "", "..", "/etc/passwd", "a/b", 7, 1 << 64, True, "model.safetensors\0", "."]
)


@anything
@given(weight_map=st.one_of(wrong, st.dictionaries(st.text(max_size=5), wrong, max_size=4)))
def test_any_index_may_be_wrong(valid, weight_map):
    folder, data = valid
    (folder / "model.safetensors").write_bytes(data)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    try:
        open_checkpoint(folder)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        index.unlink()


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\ntags: [a]\n---\n# Model\nlicense: no\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: 'qwen-research'\n---\n", "qwen-research"),
        ("# No header\nlicense: mit\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nnever ends", None),
        ("", None),
    ],
)
def test_the_license_is_what_the_model_card_says(tmp_path, card, license):
    saved(tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert open_checkpoint(tmp_path).license == license
