"""The bytes of a KV block. Nobody else knows how keys and values lie in memory.

A block holds K and V of 64 entries of one (layer, KV head). Block 0 is reserved: it is all zeros, is never written, and
stands wherever a table has nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


class KVLayout:
    """Storage of `num_blocks` single-head blocks, plain row-major K and V.

    Shapes: k, v [num_blocks, 64, head_dim].
    """

    def __init__(self, num_blocks: int, head_dim: int, dtype: torch.dtype) -> None:
        self.head_dim = head_dim
        self.dtype = dtype
        self.k = _untouched(num_blocks, head_dim, dtype)
        self.v = _untouched(num_blocks, head_dim, dtype)

    @staticmethod
    def block_nbytes(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block, K and V."""
        return 2 * BLOCK * head_dim * dtype.itemsize

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [n, D] at slots i64 [n] (block * 64 + place)."""
        self.k.view(-1, self.head_dim).index_copy_(0, slots, k)
        self.v.view(-1, self.head_dim).index_copy_(0, slots, v)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [n, D] of slots i64 [n]."""
        return self.k.view(-1, self.head_dim)[slots], self.v.view(-1, self.head_dim)[slots]

    def read_blocks(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, 64 nb, D] of blocks i32 [H, nb]: a view where they lie in order, else a gathered copy."""
        run = self._run(table)
        if run is not None:
            return run
        heads, nb = table.shape
        return self.gather(table.reshape(-1), nb) if nb else (self.k.new_empty(heads, 0, self.head_dim),) * 2

    def gather(self, blocks: Tensor, each: int) -> tuple[Tensor, Tensor]:
        """k, v [n / each, 64 each, D]: a copy of blocks i32 [n], `each` at a time."""
        shape = (len(blocks) // each, each * BLOCK, self.head_dim)
        return self.k.index_select(0, blocks).view(shape), self.v.index_select(0, blocks).view(shape)

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks i64 [n]."""
        self.k.index_fill_(0, blocks, 0)
        self.v.index_fill_(0, blocks, 0)

    def copy(self, src: Tensor, dst: Tensor) -> None:
        """Copy whole blocks i64 [n] -> i64 [n]."""
        self.k.index_copy_(0, dst, self.k.index_select(0, src))
        self.v.index_copy_(0, dst, self.v.index_select(0, src))

    def _run(self, table: Tensor) -> tuple[Tensor, Tensor] | None:
        """A strided view if each head's blocks are consecutive and the heads equally far apart."""
        ids = table.numpy()
        heads, nb = ids.shape
        if nb == 0 or ids[0, 0] == 0 or (ids[:, 1:] - ids[:, :-1] != 1).any():
            return None
        step = int(ids[1, 0] - ids[0, 0]) if heads > 1 else 0
        if step < 0 or (ids[1:, 0] - ids[:-1, 0] != step).any():
            return None
        per = BLOCK * self.head_dim
        shape, stride = (heads, nb * BLOCK, self.head_dim), (step * per, self.head_dim, 1)
        offset = int(ids[0, 0]) * per
        return self.k.as_strided(shape, stride, offset), self.v.as_strided(shape, stride, offset)


def _untouched(num_blocks: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Zeros [num_blocks, 64, head_dim] that take memory only where they are written."""
    shape = (num_blocks, BLOCK, head_dim * dtype.itemsize)
    return torch.from_numpy(np.zeros(shape, np.uint8)).view(dtype)
