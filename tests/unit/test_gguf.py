"""GGUF: every type and value is read as the gguf package reads it, and no damage does more than raise one UserError."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.evaluate.peers.files import repack
from firstlight.models.config import ModelConfig
from firstlight.models.reading import config_from_gguf
from firstlight.models.weights.checkpoint import GGUFCheckpoint, gguf_names, open_checkpoint, tensor_shapes
from firstlight.models.weights.gguf import TYPES, GGUFFile

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 8, 2, 1, 4, 6, 5, 2
DEFAULTS = {
    "block_count": LAYERS,
    "context_length": 64,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "vocab_size": VOCAB,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of the tiny model, with a head of its own."""
    layer = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    named = {f"model.layers.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in layer.items()}
    outer = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return outer | named | {"lm_head.weight": (VOCAB, HIDDEN)}


def tiny_config() -> ModelConfig:
    metadata = {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    return config_from_gguf(metadata | {f"llama.{key}": value for key, value in DEFAULTS.items()}, tie_head=False)


NAMES = gguf_names(tiny_config())


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes().items()}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as a GGUF file stores them: the two halves of each head alternate."""
    rows = [
        head * HEAD_DIM + half * HEAD_DIM // 2 + i
        for head in range(heads)
        for i in range(HEAD_DIM // 2)
        for half in (0, 1)
    ]
    return weight[rows]


def write_llama(path: Path, tensors: dict[str, np.ndarray], arch: str = "llama", **changed: object) -> Path:
    """A llama GGUF of Hugging Face tensors; `changed` replaces metadata (None leaves it out), `__` stands for a dot."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (DEFAULTS | {key.replace("__", "."): value for key, value in changed.items()}).items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("general.license", "apache-2.0")
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(VOCAB)])
    for name, value in tensors.items():
        heads = HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else 0
        stored = NAMES.get(name, name)
        writer.add_tensor(stored, interleaved(value, heads) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_comes_back_in_hugging_face_names_and_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))  # where the digest is remembered
    original = weights()
    checkpoint = open_checkpoint(write_llama(tmp_path / "m.gguf", original))
    assert sorted(checkpoint.names()) == sorted(original)
    for name, value in original.items():
        assert torch.equal(checkpoint.tensor(name), torch.from_numpy(value)), name
    config = checkpoint.config
    assert (config.num_layers, config.head_dim, config.rope_theta, config.tie_head) == (
        LAYERS,
        HEAD_DIM,
        10000.0,
        False,
    )
    assert config.rms_eps == pytest.approx(1e-5)
    assert config.kv_bytes_per_token(2) == 2 * LAYERS * KV_HEADS * HEAD_DIM * 2
    assert (checkpoint.license, len(checkpoint.digest)) == ("apache-2.0", 64)
    assert list(checkpoint.tokenizer_source) == ["tokenizer.ggml.tokens"]


def test_a_file_without_output_weight_has_a_tied_head(tmp_path):
    tensors = weights()
    del tensors["lm_head.weight"]
    checkpoint = open_checkpoint(write_llama(tmp_path / "m.gguf", tensors))
    assert checkpoint.config.tie_head
    assert "lm_head.weight" not in checkpoint.names()


@pytest.mark.parametrize("label", [label for label, _, _ in TYPES.values()])
def test_every_type_is_dequantised_as_gguf_does(tmp_path, label):
    kind, rng = Type[label], np.random.default_rng(2)
    values = rng.standard_normal((VOCAB, 256), dtype=np.float32)
    try:
        stored = quants.quantize(values, kind)
    except NotImplementedError:  # gguf only reads the K types: any finite scales will do
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 60, (VOCAB, 256 // block * block_bytes), dtype=np.uint8)
    path = write_one_tensor(tmp_path / "m.gguf", stored, kind)
    file = GGUFFile(path)
    info = file.tensors["token_embd.weight"]
    assert (info.shape, info.type, info.nbytes) == ((VOCAB, 256), label, stored.nbytes)
    assert np.array_equal(file.raw("token_embd.weight"), stored.view(np.uint8).ravel())
    got = read_embedding(path).numpy()
    expected = quants.dequantize(stored, kind).reshape(VOCAB, 256)
    assert got.dtype == np.float32
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(got, expected)


def write_one_tensor(path: Path, stored: np.ndarray, kind: Type) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_embedding(path: Path) -> torch.Tensor:
    """The one tensor, by way of the checkpoint's own code but without the rest of a model."""
    checkpoint = GGUFCheckpoint.__new__(GGUFCheckpoint)
    checkpoint.file = GGUFFile(path)
    checkpoint._infos = {"model.embed_tokens.weight": checkpoint.file.tensors["token_embd.weight"]}
    return checkpoint.tensor("model.embed_tokens.weight")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(pairs: bytes, num_pairs: int, *, num_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + pairs


def read(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "h.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value(tmp_path, version):
    scalars = [(0, "B", 200), (1, "b", -3), (2, "H", 60000), (3, "h", -5), (4, "I", 1 << 31), (5, "i", -7)]
    scalars += [(6, "f", 0.5), (7, "B", 1), (10, "Q", 1 << 63), (11, "q", -(1 << 62)), (12, "d", 0.1)]
    pairs = b"".join(string(f"k{kind}") + struct.pack(f"<I{code}", kind, value) for kind, code, value in scalars)
    pairs += string("s") + struct.pack("<I", 8) + string("smörgås")
    pairs += string("a") + struct.pack("<IIQ3h", 9, 3, 3, -1, 0, 9)
    pairs += string("b") + struct.pack("<IIQ3B", 9, 7, 3, 1, 0, 2)
    pairs += string("t") + struct.pack("<IIQ", 9, 8, 2) + string("x") + string("")
    pairs += string("n") + struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQ2B", 0, 2, 1, 2) + struct.pack("<IQ", 8, 0)
    found = read(tmp_path, header(pairs, len(scalars) + 5, version=version)).metadata
    for kind, _, value in scalars:
        assert found[f"k{kind}"] == value
    assert (found["k7"], found["s"], found["t"]) == (True, "smörgås", ["x", ""])
    assert (found["a"].tolist(), found["b"].tolist()) == ([-1, 0, 9], [True, False, True])
    assert (found["n"][0].tolist(), found["n"][1]) == ([1, 2], [])


HUGE = [1 << 22, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


@pytest.mark.parametrize("count", HUGE)
def test_impossible_counts_are_refused_without_allocating(tmp_path, count):
    key = string("k")
    tail = bytes(4096)
    made = [header(tail, count), header(tail, 0, num_tensors=count), header(struct.pack("<Q", count) + tail, 1)]
    made.append(header(key + struct.pack("<IQ", 8, count) + tail, 1))
    made += [header(key + struct.pack("<IIQ", 9, kind, count) + tail, 1) for kind in (0, 7, 8, 9, 12)]
    tensor = string("t") + struct.pack("<IQQIQ", 2, count, count, 0, 0)
    made.append(header(tensor + tail, 0, num_tensors=1))
    made.append(header(string("t") + struct.pack("<IQIQ", 1, 4, 0, count) + tail, 0, num_tensors=1))
    tracemalloc.start()
    for data in made:
        with pytest.raises(UserError, match="damaged or cut short"):
            read(tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_string_longer_than_any_real_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="impossible length of a string"):
        read(tmp_path, header(string("k") + struct.pack("<IQ", 8, 1 << 25) + bytes(1 << 25), 1))


def test_many_empty_strings_are_refused_before_they_are_made(tmp_path):
    zeros = bytes(8 * ((1 << 21) + 1))
    with pytest.raises(UserError, match="impossible number of strings"):
        read(tmp_path, header(string("k") + struct.pack("<IIQ", 9, 8, (1 << 21) + 1) + zeros, 1))


BAD_HEADERS = {
    "cut short": b"GGUF",
    "not a GGUF file": b"PK\x03\x04" + bytes(64),
    "version 1 is not known": header(b"", 0, version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "nested deeper": header(string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, 1),
    "unknown value type 13": header(string("k") + struct.pack("<I", 13) + bytes(64), 1),
    "invalid text": header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64), 1),
    "appears twice": header((string("k") + struct.pack("<IB", 0, 1)) * 2, 2),
    "has 9 dimensions": header(string("t") + struct.pack("<I", 9) + bytes(99), 0, num_tensors=1),
    "'t' has unsupported type IQ4_NL": header(string("t") + struct.pack("<IQIQ", 1, 32, 20, 0), 0, num_tensors=1),
    "'t' has unsupported type number 99": header(string("t") + struct.pack("<IQIQ", 1, 32, 99, 0), 0, num_tensors=1),
    "which Q4_0 cannot hold": header(string("t") + struct.pack("<IQIQ", 1, 33, 2, 0), 0, num_tensors=1),
    "outside the file": header(string("t") + struct.pack("<IQIQ", 1, 32, 0, 0), 0, num_tensors=1),
    "overlaps": header(
        b"".join(string(n) + struct.pack("<IQIQ", 1, 8, 0, 0) for n in "tu") + bytes(99), 0, num_tensors=2
    ),
    "or overlaps another": header((string("t") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2 + bytes(99), 0, num_tensors=2),
    "impossible alignment": header(string("general.alignment") + struct.pack("<II", 4, 0), 1),
}


@pytest.mark.parametrize("message", BAD_HEADERS)
def test_bad_headers_are_named(tmp_path, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, BAD_HEADERS[message])
    assert "h.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_checkpoint(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="empty"):
        read(tmp_path, b"")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arch": "mamba"}, r"architecture 'mamba' is not supported.*llama"),
        ({"block_count": None}, "does not say its block_count"),
        ({"block_count": 3}, "layers.2.input_layernorm.weight is missing"),
        ({"block_count": 0}, "num_layers is 0"),
        ({"block_count": 1 << 31}, "impossible"),
        ({"block_count": 1}, "belongs to no supported architecture"),
        ({"feed_forward_length": 7}, r"shape \[6, 8\], its config says \[7, 8\]"),
        ({"embedding_length": "x"}, "embedding_length is x"),
        ({"attention__head_count": 0}, "num_heads is 0"),
        ({"attention__head_count_kv": 3}, "cannot share 3 KV heads"),
        ({"rope__dimension_count": 2}, "only a part of each head"),
        ({"rope__scaling__type": "dynamic"}, "RoPE scaling 'dynamic'"),
    ],
)
def test_models_that_cannot_be_run_are_refused_by_name(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        open_checkpoint(write_llama(tmp_path / "m.gguf", weights(), **changed))


def test_a_bias_is_refused_rather_than_ignored(tmp_path):
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.bias"):
        open_checkpoint(write_llama(tmp_path / "m.gguf", weights() | {"blk.0.attn_q.bias": np.zeros(8, np.float32)}))


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> tuple[bytes, int, Path]:
    """A good file's bytes, how many of them are header, and where to put a damaged copy."""
    folder = tmp_path_factory.mktemp("damage")
    path = write_llama(folder / "valid.gguf", weights())
    header_len = min(info.offset for info in GGUFFile(path).tensors.values())
    return path.read_bytes(), header_len, folder / "damaged.gguf"


def attempt(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except UserError as error:
        assert "\n" not in str(error)


anything = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused(valid, share):
    data, _, path = valid
    length = int(share * (len(data) - 32))  # the last tensor may be followed by padding
    path.write_bytes(data[:length])
    with pytest.raises(UserError):
        open_checkpoint(path)


@anything
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=3))
@example(flips=[(8, 255)])
def test_flipped_bytes_are_refused_or_harmless(valid, flips):
    data, header_len, path = valid
    damaged = bytearray(data)
    for position, mask in flips:
        damaged[position % header_len] ^= mask
    attempt(path, bytes(damaged))


@anything
@given(position=st.integers(0, 1 << 20), number=st.sampled_from([0, 1, 1 << 31, 1 << 62, (1 << 64) - 1]))
def test_any_length_may_be_wrong(valid, position, number):
    data, header_len, path = valid
    position %= header_len
    attempt(path, data[:position] + struct.pack("<Q", number) + data[position + 8 :])


def test_shapes_of_the_config_are_those_of_the_architecture():
    assert tensor_shapes(tiny_config()) == shapes()
    assert len(set(NAMES.values())) == len(shapes()) == len(NAMES)


@pytest.mark.parametrize(("form", "within"), [("BF16", 2**-8), ("F16", 2**-10), ("Q8_0", 1 / 127), ("Q4_0", 1 / 7)])
def test_a_file_for_a_peer_holds_the_same_model_in_another_type(tmp_path, monkeypatch, form, within):
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))
    wide = {"HIDDEN": 64, "HEAD_DIM": 32, "FFN": 96}  # quantised blocks hold 32 values
    for name, size in wide.items():
        monkeypatch.setitem(globals(), name, size)
    sizes = {"embedding_length": 64, "feed_forward_length": 96}
    original = open_checkpoint(write_llama(tmp_path / "m.gguf", weights(), **sizes))
    repack(original.path, form, tmp_path / "other.gguf")
    other = open_checkpoint(tmp_path / "other.gguf")
    assert other.config == original.config and other.file.metadata.keys() >= original.file.metadata.keys()
    assert other.tokenizer_source == original.tokenizer_source
    for name, shape in original.shapes.items():
        wanted = (
            "F32" if len(shape) == 1 else "Q8_0" if form == "Q4_0" and ("embed" in name or "lm_head" in name) else form
        )
        assert other.types[name] == wanted
        values = original.tensor(name)
        assert (other.tensor(name) - values).abs().max() <= within * values.abs().max(), name
