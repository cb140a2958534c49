"""A checkpoint's tensors as they are computed with, each read from the file when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.kernels.blocks import TYPES
from firstlight.models.decoder import Weight
from firstlight.models.weights.checkpoint import Checkpoint
from firstlight.models.weights.gguf import TYPES as SIZES


class Weights(Mapping[str, Tensor]):
    """Hugging Face name -> tensor in `dtype`; 1-d ones (norm gains, biases) are float32. Nothing is held."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def nbytes(self, name: str) -> float:
        """Of one of them, about."""
        return math.prod(self._checkpoint.shapes[name]) * self._dtype.itemsize

    def __getitem__(self, name: str) -> Tensor:
        dtype = torch.float32 if len(self._checkpoint.shapes[name]) == 1 else self._dtype
        return self._checkpoint.tensor(name).to(dtype).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names())

    def __len__(self) -> int:
        return len(self._checkpoint.names())

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.shapes


class CompactWeights(Mapping[str, Weight]):
    """The same, but what the file has in blocks comes in these."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype, self._others = checkpoint, dtype, Weights(checkpoint, dtype)
        self._blocks = {name: kind for name, kind in checkpoint.types.items() if kind in TYPES}
        if not self._blocks:
            raise UserError(f"{checkpoint.path} has no blocks of 4 to 8 bits to compute from; leave --weights out")

    def nbytes(self, name: str) -> float:
        """Of one of them, about."""
        if name not in self._blocks:
            return self._others.nbytes(name)
        return math.prod(self._checkpoint.shapes[name]) * _SIZES[self._blocks[name]]

    def __getitem__(self, name: str) -> Weight:
        if name in self._blocks:
            return self._checkpoint.stored(name, self._dtype)
        return self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._others)

    def __len__(self) -> int:
        return len(self._others)


_SIZES = {kind: size / count for kind, count, size in SIZES.values()}
"""Bytes of a scalar."""
