"""A model on disk, whatever its format, seen as one thing: a config and float32 tensors under Hugging Face names.

`open_checkpoint` takes a GGUF file or a directory with config.json and *.safetensors. Opening reads headers only and
checks every tensor's shape against the config, so that nothing later has to; the bytes are read when `tensor` is
called, which is once per model (`store` keeps the result).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from firstlight.core.errors import UserError
from firstlight.models.config import ModelConfig, config_from_gguf, config_from_hf
from firstlight.models.weights.digest import digest_of
from firstlight.models.weights.gguf import TensorInfo
from firstlight.models.weights.shards import card_license, open_tensors, read_json, shards
from firstlight.models.weights.split import GGUFModel

_HEAD = "lm_head.weight"
# Hugging Face name: GGUF name; {} is the layer.
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Checkpoint(Protocol):
    """An opened model: its config and the shape of every tensor by Hugging Face name.

    `tokenizer_source` is plain data for `prompt.tokenizer`: GGUF metadata, or the directory.
    """

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    license: str | None

    @property
    def tokenizer_source(self) -> Mapping[str, Any] | Path: ...

    @property
    def digest(self) -> str:
        """sha256 (hex) of the weights' file or files."""
        ...

    @property
    def types(self) -> dict[str, str]:
        """The stored type of each tensor, by Hugging Face name."""
        ...

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in float32 and Hugging Face layout, e.g. [out, in]; a fresh one each time."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and check a model; UserError where it is missing, damaged, incomplete or of an unknown kind."""
    return SafetensorsCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a llama-family model must have, with its shape ([out, in] for a linear)."""
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.tie_head else {**shapes, _HEAD: (config.vocab_size, hidden)}


def _check_shapes(
    path: Path, needed: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], unused: set[str]
) -> None:
    """`unused` are tensors that the model would silently ignore: the sign of an architecture that is not ours."""
    for name, shape in needed.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing; the file is incomplete, fetch it again")
        if found[name] != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(found[name])}, its config says {list(shape)}; fetch it again"
            )
    if unused:
        raise UserError(f"{path}: tensor {min(unused)!r} belongs to no supported architecture; use another model")


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{_INNER[part]}.weight"


class GGUFCheckpoint:
    """A GGUF file, or the several that a model was split into, as a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFModel(path)
        metadata, tensors = self.file.metadata, self.file.tensors
        self.config = config_from_gguf(metadata, tie_head="output.weight" not in tensors)
        stated = metadata.get("general.license")
        self.license = stated if isinstance(stated, str) else None
        self.shapes = tensor_shapes(self.config)
        self.tokenizer_source = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        self._infos = {name: tensors[gguf_name(name)] for name in self.shapes if gguf_name(name) in tensors}
        unused = tensors.keys() - {info.name for info in self._infos.values()}
        _check_shapes(path, self.shapes, {name: info.shape for name, info in self._infos.items()}, unused)

    @property
    def digest(self) -> str:
        return digest_of(self.file.paths)

    @property
    def types(self) -> dict[str, str]:
        return {name: info.type for name, info in self._infos.items()}

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        values = _dequantise(self.file.raw(info.name), info)
        if ".q_proj." in name:
            return _unpermute(values, self.config.num_heads)
        if ".k_proj." in name:
            return _unpermute(values, self.config.num_kv_heads)
        return values


def _dequantise(raw: np.ndarray, info: TensorInfo) -> torch.Tensor:
    """Stored bytes to float32 of the tensor's shape. `gguf` is slow to import, so only a first start imports it."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if info.type in plain:
        return torch.from_numpy(raw.copy()).view(plain[info.type]).reshape(info.shape).float()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(raw, GGMLQuantizationType[info.type])
    return torch.from_numpy(values.reshape(info.shape)).float()


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of [num_heads * head_dim, in] from interleaved rotary pairs (GGUF) to halves (Hugging Face)."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


class SafetensorsCheckpoint:
    """A directory with config.json and safetensors, one file or an index of shards, as a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_from_hf(read_json(path / "config.json"))
        self.license = card_license(path / "README.md")
        self.shapes = tensor_shapes(self.config)
        self.tokenizer_source = path
        self._files = shards(path)
        self._handles = open_tensors(self._files)
        if self.config.tie_head:  # some exporters store the tied head again
            self._handles.pop(_HEAD, None)
        found = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}
        unused = {name for name in found.keys() - self.shapes.keys() if not name.endswith("rotary_emb.inv_freq")}
        _check_shapes(path, self.shapes, found, unused)

    @property
    def digest(self) -> str:
        return digest_of([self.path / "config.json", *self._files])

    @property
    def types(self) -> dict[str, str]:
        return {name: str(self._handles[name].get_slice(name).get_dtype()) for name in self.names()}

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> torch.Tensor:
        values: torch.Tensor = self._handles[name].get_tensor(name)
        return values.to(torch.float32, copy=True)
