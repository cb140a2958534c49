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
from firstlight.kernels.blocks import Stored
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import tensor_names
from firstlight.models.families import FAMILIES
from firstlight.models.reading import ROPE_TENSORS, config_from_gguf, config_from_hf
from firstlight.models.weights.digest import digest_of
from firstlight.models.weights.gguf import TensorInfo
from firstlight.models.weights.shards import card_license, open_tensors, read_json, shards
from firstlight.models.weights.split import GGUFModel

_HEAD = "lm_head.weight"
_EXPERTS = ".mlp.experts."


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

    def stored(self, name: str, dtype: torch.dtype) -> Stored:
        """The tensor in the blocks that `types` says, in the same layout, to be computed in `dtype`; a fresh one."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and check a model; UserError where it is missing, damaged, incomplete or of an unknown kind."""
    return SafetensorsCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model must have, with its shape ([out, in] for a linear)."""
    return {name: shape for name, (_, shape) in tensor_names(FAMILIES[config.architecture], config).items()}


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


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every tensor that a model must have."""
    return {name: gguf for name, (gguf, _) in tensor_names(FAMILIES[config.architecture], config).items()}


class GGUFCheckpoint:
    """A GGUF file, or the several that a model was split into, as a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFModel(path)
        metadata, tensors = self.file.metadata, self.file.tensors
        divisors = {setting: f"{name}.weight" for name, setting in ROPE_TENSORS.items() if f"{name}.weight" in tensors}
        self.config = config_from_gguf(
            metadata,
            tie_head="output.weight" not in tensors,
            divisors={setting: self._stored(name).flatten().tolist() for setting, name in divisors.items()},
        )
        stated = metadata.get("general.license")
        self.license = stated if isinstance(stated, str) else None
        self.shapes = tensor_shapes(self.config)
        self.tokenizer_source = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        stored = gguf_names(self.config)
        self._infos = {name: tensors[gguf] for name, gguf in stored.items() if gguf in tensors}
        unused = tensors.keys() - {*stored.values(), *divisors.values()}
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
        family = FAMILIES[self.config.architecture]
        return family.from_gguf(self.config, name, self._stored(self._infos[name].name))

    def stored(self, name: str, dtype: torch.dtype) -> Stored:
        info, family = self._infos[name], FAMILIES[self.config.architecture]
        raw = torch.from_numpy(self.file.raw(info.name).copy()).view(*info.shape[:-1], -1)
        return Stored(info.type, family.from_gguf(self.config, name, raw), dtype)

    def _stored(self, name: str) -> torch.Tensor:
        """A tensor by its GGUF name, float32, as the file lays it out."""
        return _dequantise(self.file.raw(name), self.file.tensors[name])


def _dequantise(raw: np.ndarray, info: TensorInfo) -> torch.Tensor:
    """Stored bytes to float32 of the tensor's shape. `gguf` is slow to import, so only a first start imports it."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if info.type in plain:
        return torch.from_numpy(raw.copy()).view(plain[info.type]).reshape(info.shape).float()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(raw, GGMLQuantizationType[info.type])
    return torch.from_numpy(values.reshape(info.shape)).float()


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
        self._pieces = {name: _pieces(name, shape) for name, shape in self.shapes.items()}
        pieces = {piece for each in self._pieces.values() for piece in each}
        unused = {name for name in self._handles.keys() - pieces if not name.endswith("rotary_emb.inv_freq")}
        _check_shapes(path, self._piece_shapes(), self._found(), unused)

    @property
    def digest(self) -> str:
        return digest_of([self.path / "config.json", *self._files])

    @property
    def types(self) -> dict[str, str]:
        first = {name: pieces[0] for name, pieces in self._pieces.items()}
        return {name: str(self._handles[piece].get_slice(piece).get_dtype()) for name, piece in first.items()}

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> torch.Tensor:
        pieces = self._pieces[name]
        if len(pieces) > 1:
            return torch.stack([self._handles[piece].get_tensor(piece).float() for piece in pieces])
        values: torch.Tensor = self._handles[pieces[0]].get_tensor(pieces[0])
        return values.to(torch.float32, copy=True).view(self.shapes[name])

    def stored(self, name: str, dtype: torch.dtype) -> Stored:
        raise AssertionError("these files hold no blocks")

    def _found(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def _piece_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes as they must be in the files."""
        return {
            piece: self.shapes[name][1:] if _EXPERTS in name else self.shapes[name]
            for name, pieces in self._pieces.items()
            for piece in pieces
        }


def _pieces(name: str, shape: tuple[int, ...]) -> list[str]:
    """Where a tensor lies in the files: experts are stored one by one, in all else a tensor is a tensor."""
    before, experts, after = name.partition(_EXPERTS)
    return [f"{before}{experts}{i}.{after}" for i in range(shape[0])] if experts else [name]
