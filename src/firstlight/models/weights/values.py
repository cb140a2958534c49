"""A checkpoint's tensors in the type that they are computed with, each read from the file when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from firstlight.models.weights.checkpoint import Checkpoint


class Weights(Mapping[str, Tensor]):
    """Hugging Face name -> tensor in `dtype`; 1-d ones (norm gains, biases) are float32. Nothing is held."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    @property
    def nbytes(self) -> int:
        """All of them together, about."""
        return sum(math.prod(shape) for shape in self._checkpoint.shapes.values()) * self._dtype.itemsize

    def __getitem__(self, name: str) -> Tensor:
        dtype = torch.float32 if len(self._checkpoint.shapes[name]) == 1 else self._dtype
        return self._checkpoint.tensor(name).to(dtype).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names())

    def __len__(self) -> int:
        return len(self._checkpoint.names())

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.shapes
