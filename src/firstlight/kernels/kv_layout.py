"""The bytes of a KV block. Nobody else knows how keys and values lie in memory.

A block holds K and V of 64 entries of one (layer, KV head), in the order in which dot products of `pair` scalars
consume them (4 of int8, 2 of bf16, 1 of float32): K as [D / pair, 64, pair], V as [64 / pair, D, pair]. Block 0 is
reserved: it is all zeros, is never written, and stands wherever a table has nothing.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.kernels.native import lib
from firstlight.kernels.rows8 import ZERO_POINT
from firstlight.kernels.torch.quantise import rounded, turned_back

BLOCK = 64
_PARTS = 3
"""Numbers of bf16 that a float32 is the sum of."""
_LEAST_SCALE = 2.0**-60
"""Of an entry of V, whose logarithm is kept."""


class KVLayout:
    """Storage of `num_blocks` single-head blocks.

    Shapes: k [num_blocks, D / pair, 64, pair], v [num_blocks, 64 / pair, D, pair].
    """

    tag = "pairs"
    """Names the meaning of a block's bytes: what `export` gave can be restored under the same tag only."""
    is_int8 = False

    def __init__(self, num_blocks: int, head_dim: int, dtype: torch.dtype) -> None:
        self.head_dim, self.dtype = head_dim, dtype
        self.pair = 4 // dtype.itemsize
        size = (num_blocks, BLOCK * head_dim * dtype.itemsize)
        self.k = _untouched(size).view(dtype).view(num_blocks, head_dim // self.pair, BLOCK, self.pair)
        self.v = _untouched(size).view(dtype).view(num_blocks, BLOCK // self.pair, head_dim, self.pair)

    @classmethod
    def holding(cls, k: Tensor, v: Tensor) -> tuple[Tensor, Self]:
        """Blocks for the rows of k, v [n, H, D] alone, and the table i32 [H, nb] that names them."""
        n, heads, dim = k.shape
        table = torch.arange(1, heads * -(-n // BLOCK) + 1, dtype=torch.int32).view(heads, -1)
        layout, entry = cls(table.numel() + 1, dim, k.dtype), torch.arange(n)
        layout.write(table[:, entry // BLOCK].T.long() * BLOCK + entry[:, None] % BLOCK, k, v)
        return table, layout

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
            how = (torch.get_num_threads(), self.dtype == torch.bfloat16, self.is_int8)
            lib.write_kv(*where, slots.data_ptr(), n, heads, dim, *how)
            return
        self.lay(slots, *self.pack(k[:n], v[:n]))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [n, D] of slots i64 [n]."""
        return self.lift(slots)

    def pack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [.., D] -> what is stored of each entry [.., E]."""
        return k, v

    def lift(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored at slots i64 [n], [n, E]: `lay` puts it elsewhere without another rounding."""
        block, place = self._place(slots)
        k = self.k[block, :, place].reshape(len(slots), self.head_dim)
        return k, self.v[block, place // self.pair, :, place % self.pair]

    def lay(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put what `lift` or `pack` gave, [.., E], at slots i64 [..]."""
        block, place = self._place(slots)
        self.k[block, :, place] = k.reshape(len(block), self.head_dim // self.pair, self.pair)
        self.v[block, place // self.pair, :, place % self.pair] = v.reshape(len(block), self.head_dim)

    def read_blocks(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, 64 nb, D] of blocks i32 [H, nb]: row-major copies."""
        keys = self.read_keys(table)
        return keys, self.v.index_select(0, table.reshape(-1)).transpose(2, 3).reshape(keys.shape)

    def read_keys(self, table: Tensor) -> Tensor:
        """k [H, 64 nb, D] alone; a pair is copied as the word that it is."""
        words = self.k.view(torch.int32).squeeze(-1).index_select(0, table.reshape(-1)).transpose(1, 2)
        words = words.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves no blocks at all as they are
        return words.view(self.dtype).view(table.shape[0], table.shape[1] * BLOCK, self.head_dim)

    def product(self, rows: Tensor, table: Tensor, out: Tensor) -> None:
        """out f32 [m, n]: rows f32 [m, D] by the first n keys of one head's blocks i32 [nb], in float32's precision.

        K lies as weights do (csrc/matmul.h): blocks are panels. Rows are summed of such as the blocks' type holds.
        """
        table = table[: -(-out.shape[1] // BLOCK)]
        if lib is None or self.is_int8:
            out.copy_(rows @ self.read_keys(table[None])[0, : out.shape[1]].float().T)
            return
        panels, rest = self.k.index_select(0, table), rows
        for number in range(_PARTS):
            part = rest.to(self.dtype)
            made = torch.empty_like(out) if number else out
            _multiply(part, panels, made)
            if number:
                out += made
            rest = rest - part.float()
            if not bool(rest.any()):
                break

    def seen(self, q: Tensor) -> Tensor:
        """Queries [.., D] as scores see them."""
        return q

    def clear(self, blocks: Tensor) -> None:
        """Zero whole blocks i64 [n]."""
        for store in (self.k, self.v):
            store.flatten(1).view(torch.uint8).numpy()[blocks.numpy()] = 0

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

    def poison(self, blocks: Tensor) -> None:
        """Fill whole blocks i64 [n] with nan."""
        for store in (self.k, self.v):
            store[blocks] = torch.nan

    def _place(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Block and place of each slot, flat."""
        flat = slots.reshape(-1)
        return torch.div(flat, BLOCK, rounding_mode="floor"), flat % BLOCK


class Int8Layout(KVLayout):
    """The same in 8 bits: each entry turned by a Hadamard matrix and rounded by itself (rows8.py).

    Stored are bytes, of K around 128, of V around 0, and behind them 64 float32: K's scales, and to base 2 the
    logarithms of V's. Shapes: k, v u8 [num_blocks, 64 (D + 4)]. An entry by itself is u8 [D + 4].
    """

    tag = "int8"
    is_int8 = True

    def __init__(self, num_blocks: int, head_dim: int, dtype: torch.dtype) -> None:
        """`dtype`: of the model, and of what is read."""
        self.head_dim, self.dtype, self.pair = head_dim, dtype, 4
        size, values = BLOCK * (head_dim + 4), BLOCK * head_dim
        self.k, self.v = _untouched((num_blocks, size)), _untouched((num_blocks, size))
        self._k8 = self.k[:, :values].view(num_blocks, head_dim // 4, BLOCK, 4)
        self._v8 = self.v[:, :values].view(num_blocks, BLOCK // 4, head_dim, 4)
        self._k_scale, self._v_log = (store[:, values:].view(num_blocks, BLOCK, 4) for store in (self.k, self.v))

    @staticmethod
    def block_nbytes(head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block, K and V."""
        return 2 * BLOCK * (head_dim + 4)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [n, D] of slots i64 [n]."""
        k, v = self.lift(slots)
        return self._keys(k[:, :-4], k[:, -4:]), self._values(v[:, :-4], v[:, -4:])

    def pack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [.., D] -> u8 [.., D + 4]."""
        (k8, k_scale), (v8, v_scale) = (rounded(x.reshape(-1, self.head_dim).float()) for x in (k, v))
        v_log = v_scale.clamp(min=_LEAST_SCALE).log2()
        stored = ((k8, k_scale), (v8 ^ ZERO_POINT, v_log))
        shape = (*k.shape[:-1], self.head_dim + 4)
        packed_k, packed_v = (torch.cat([x, _bytes(s[:, None])], -1).view(shape) for x, s in stored)
        return packed_k, packed_v

    def lift(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """u8 [n, D + 4] of slots i64 [n]."""
        block, place = self._place(slots)
        k = self._k8[block, :, place].reshape(len(block), self.head_dim)
        v = self._v8[block, place // 4, :, place % 4]
        return torch.cat([k, self._k_scale[block, place]], -1), torch.cat([v, self._v_log[block, place]], -1)

    def lay(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put u8 [.., D + 4] at slots i64 [..]."""
        block, place = self._place(slots)
        k, v = (x.reshape(len(block), self.head_dim + 4) for x in (k, v))
        self._k8[block, :, place] = k[:, :-4].reshape(len(block), self.head_dim // 4, 4)
        self._v8[block, place // 4, :, place % 4] = v[:, :-4]
        self._k_scale[block, place], self._v_log[block, place] = k[:, -4:], v[:, -4:]

    def read_blocks(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, 64 nb, D] of blocks i32 [H, nb]: row-major copies."""
        blocks, k = table.reshape(-1), self.read_keys(table)
        v8 = self._v8.index_select(0, blocks).transpose(2, 3).reshape(-1, BLOCK, self.head_dim)
        return k, self._values(v8, self._v_log.index_select(0, blocks)).view(k.shape)

    def read_keys(self, table: Tensor) -> Tensor:
        """k [H, 64 nb, D] alone."""
        shape = (table.shape[0], table.shape[1] * BLOCK, self.head_dim)
        if lib is None:
            blocks = table.reshape(-1)
            k8 = self._k8.index_select(0, blocks).transpose(1, 2).reshape(-1, BLOCK, self.head_dim)
            return self._keys(k8, self._k_scale.index_select(0, blocks)).view(shape)
        numbers, out = table.to(torch.int32).contiguous(), torch.empty(shape, dtype=self.dtype)
        where = (self.k.data_ptr(), numbers.data_ptr(), out.data_ptr(), numbers.numel(), self.head_dim)
        lib.read_keys(*where, torch.get_num_threads(), self.dtype == torch.bfloat16)
        return out

    def seen(self, q: Tensor) -> Tensor:
        """Queries [.., D] as scores see them: rounded as keys are."""
        values, scale = rounded(q.reshape(-1, self.head_dim).float())
        return turned_back((values.float() - ZERO_POINT) * scale[:, None]).view(q.shape).to(q.dtype)

    def poison(self, blocks: Tensor) -> None:
        """Fill whole blocks i64 [n] with nan: their scales."""
        for store in (self._k_scale, self._v_log):
            store[blocks] = _bytes(torch.tensor([torch.nan]))

    def _keys(self, values: Tensor, scale: Tensor) -> Tensor:
        """u8 [.., D] and the bytes of their scales [.., 4] -> k [.., D]."""
        return turned_back((values.float() - ZERO_POINT) * _floats(scale)).to(self.dtype)

    def _values(self, values: Tensor, log: Tensor) -> Tensor:
        """u8 [.., D] and the bytes of their scales' logarithms [.., 4] -> v [.., D]."""
        return turned_back(values.contiguous().view(torch.int8).float() * torch.exp2(_floats(log))).to(self.dtype)


def _multiply(rows: Tensor, panels: Tensor, out: Tensor) -> None:
    """out f32 [m, n]: rows [m, D] by keys in blocks [nb, D / pair, 64, pair]."""
    assert lib is not None and out.is_contiguous()
    where = (rows.data_ptr(), panels.data_ptr(), out.data_ptr(), rows.stride(0), out.shape[1])
    how = (*rows.shape, out.shape[1], torch.get_num_threads(), int(rows.dtype == torch.bfloat16), True)
    lib.matmul(*where, *how, 0, 0, 0)


def _floats(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float32)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _heads_lie_together(x: Tensor) -> bool:
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _untouched(shape: tuple[int, int]) -> Tensor:
    """Zero bytes that take memory only where they are written."""
    return torch.from_numpy(np.zeros(shape, np.uint8))
