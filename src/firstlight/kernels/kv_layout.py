"""The bytes of a KV block. Nobody else knows how keys and values lie in memory.

A block holds K and V of 64 entries of one (layer, KV head), in the order in which dot products of `pair` scalars
consume them (2 of bf16, 1 of float32): K as [D / pair, 64, pair], V as [64 / pair, D, pair]. Block 0 is reserved: it is
all zeros, is never written, and stands wherever a table has nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.kernels.native import lib

BLOCK = 64


class KVLayout:
    """Storage of `num_blocks` single-head blocks.

    Shapes: k [num_blocks, D / pair, 64, pair], v [num_blocks, 64 / pair, D, pair].
    """

    tag = "pairs"
    """Names the meaning of a block's bytes: what `export` gave can be restored under the same tag only."""

    def __init__(self, num_blocks: int, head_dim: int, dtype: torch.dtype) -> None:
        self.head_dim, self.dtype = head_dim, dtype
        self.pair = 4 // dtype.itemsize
        size = (num_blocks, BLOCK * head_dim * dtype.itemsize)
        self.k = _untouched(size).view(dtype).view(num_blocks, head_dim // self.pair, BLOCK, self.pair)
        self.v = _untouched(size).view(dtype).view(num_blocks, BLOCK // self.pair, head_dim, self.pair)

    @staticmethod
    def block_nbytes(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block, K and V."""
        return 2 * BLOCK * head_dim * dtype.itemsize

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put the first n rows of k, v [.., H, D] at slots i64 [n, H] (block * 64 + place)."""
        n, (_, heads, dim) = slots.shape[0], k.shape
        slots = slots.contiguous()
        if lib is not None and _heads_lie_together(k) and _heads_lie_together(v):
            where = (k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), self.k.data_ptr(), self.v.data_ptr())
            bf16 = self.dtype == torch.bfloat16
            lib.write_kv(*where, slots.data_ptr(), n, heads, dim, torch.get_num_threads(), bf16)
            return
        block, place = self._place(slots)
        self.k[block, :, place] = k[:n].reshape(n * heads, -1, self.pair)
        self.v[block, place // self.pair, :, place % self.pair] = v[:n].reshape(n * heads, dim)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [n, D] of slots i64 [n]."""
        block, place = self._place(slots)
        k = self.k[block, :, place].reshape(len(slots), self.head_dim)
        return k, self.v[block, place // self.pair, :, place % self.pair]

    def read_blocks(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, 64 nb, D] of blocks i32 [H, nb]: row-major copies."""
        keys = self.read_keys(table)
        return keys, self.v.index_select(0, table.reshape(-1)).transpose(2, 3).reshape(keys.shape)

    def read_keys(self, table: Tensor) -> Tensor:
        """k [H, 64 nb, D] alone; a pair is copied as the word that it is."""
        words = self.k.view(torch.int32).squeeze(-1).index_select(0, table.reshape(-1)).transpose(1, 2).contiguous()
        return words.view(self.dtype).view(table.shape[0], table.shape[1] * BLOCK, self.head_dim)

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks i64 [n]."""
        self.k.index_fill_(0, blocks, 0)
        self.v.index_fill_(0, blocks, 0)

    def copy(self, src: Tensor, dst: Tensor) -> None:
        """Copy whole blocks i64 [n] -> i64 [n]."""
        self.k.index_copy_(0, dst, self.k.index_select(0, src))
        self.v.index_copy_(0, dst, self.v.index_select(0, src))

    def export(self, blocks: Tensor) -> NDArray[np.uint8]:
        """The bytes of whole blocks i64 [n], u8 [n, block_nbytes]: K, then V, as they are stored."""
        halves = [store.index_select(0, blocks).flatten(1).view(torch.uint8).numpy() for store in (self.k, self.v)]
        return np.concatenate(halves, axis=1)

    def restore(self, blocks: Tensor, data: NDArray[np.uint8]) -> None:
        """Put the bytes u8 [n, block_nbytes] that `export` gave into whole blocks i64 [n]."""
        where = blocks.numpy()
        for store, half in zip((self.k, self.v), np.split(data, 2, axis=1)):
            store.flatten(1).view(torch.uint8).numpy()[where] = half

    def _place(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place of each slot, flat."""
        flat = slots.reshape(-1)
        return torch.div(flat, BLOCK, rounding_mode="floor"), flat % BLOCK


def _heads_lie_together(x: Tensor) -> bool:
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _untouched(shape: tuple[int, int]) -> Tensor:
    """Zero bytes that take memory only where they are written."""
    return torch.from_numpy(np.zeros(shape, np.uint8))
