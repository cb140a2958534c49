"""Weights as GGUF files hold them, in blocks of 4 to 8 bits, and what each type of block means.

Every type is one thing with other numbers: scalars q of few bits without a sign, worth d q + m each. d and m are
float16 and hold for 32 scalars, or for 256 of which each 16 or 32 multiply them by an integer of their own; where a
block has no m it is -zero d. Layouts are those of ggml's block_q4_0 .. block_q6_K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it, [.., O, I]: rows of blocks."""

    type: str
    raw: Tensor
    """u8 [.., O, bytes of a row]"""
    dtype: torch.dtype
    """What it is to be computed in."""

    def dim(self) -> int:
        return self.raw.dim()

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, number: int) -> Stored:
        """One of the experts in a tensor of many."""
        return Stored(self.type, self.raw[number], self.dtype)


@dataclass(frozen=True)
class Quants:
    """Weights [O, I] taken apart: exact, and no larger in sum than they were."""

    q: Tensor
    """u8 [O, I]"""
    bits: int
    zero: int
    d: Tensor
    """float16 [O, I / super]"""
    m: Tensor | None = None
    sub_d: Tensor | None = None
    """s8 [O, I / sub]: factors of d; `sub_m` of m."""
    sub_m: Tensor | None = None

    @property
    def super(self) -> int:
        return self.q.shape[1] // self.d.shape[1]

    @property
    def sub(self) -> int:
        return self.super if self.sub_d is None else self.q.shape[1] // self.sub_d.shape[1]


def unpacked(stored: Stored) -> Quants:
    """A matrix of blocks, taken apart."""
    size, take = _TYPES[stored.type]
    return take(stored.raw.view(len(stored.raw), -1, size))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, [O, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(part: Tensor) -> Tensor:
    """u8 [.., n] -> [.., 2n]: all low halves, then all high ones."""
    return torch.cat([part & 15, part >> 4], -1)


def _bits(part: Tensor, first: int) -> Tensor:
    """u8 [.., n] -> bits [.., 8n], the lowest of each byte first, as parts of q from bit `first` on."""
    return ((part[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) << first


def _q4(offset: int, zero: int) -> Callable[[Tensor], Quants]:
    def take(b: Tensor) -> Quants:
        m = _half(b, 2) if offset == 4 else None
        return Quants(_nibbles(b[..., offset:]).flatten(1), 4, zero, _half(b, 0), m)

    return take


def _q5(offset: int, zero: int) -> Callable[[Tensor], Quants]:
    def take(b: Tensor) -> Quants:
        q = _nibbles(b[..., offset + 4 :]) | _bits(b[..., offset : offset + 4], 4)
        return Quants(q.flatten(1), 5, zero, _half(b, 0), _half(b, 2) if offset == 4 else None)

    return take


def _q8_0(b: Tensor) -> Quants:
    return Quants((b[..., 2:] ^ 128).flatten(1), 8, 128, _half(b, 0))


def _factors(s: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes of a block of 256 -> 8 factors of 6 bits for d and 8 for m, these negative: s8 [O, 8 a block]."""
    low, mid, high = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    d = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    m = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], -1)
    return d.flatten(1).view(torch.int8), m.flatten(1).view(torch.int8).neg()


def _q4_k(b: Tensor) -> Quants:
    q = _nibbles(b[..., 16:].reshape(len(b), -1, 32))
    return Quants(q.flatten(1), 4, 0, _half(b, 0), _half(b, 2), *_factors(b[..., 4:16]))


def _q5_k(b: Tensor) -> Quants:
    high = (b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    q = _nibbles(b[..., 48:].reshape(*b.shape[:2], 4, 32)).flatten(-2) | (high << 4).flatten(-2)
    return Quants(q.flatten(1), 5, 0, _half(b, 0), _half(b, 2), *_factors(b[..., 4:16]))


def _q6_k(b: Tensor) -> Quants:
    low = _nibbles(b[..., :128].reshape(*b.shape[:2], 2, 64))
    high = (
        b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    ) & 3
    q = low.flatten(1) | (high << 4).flatten(1)
    return Quants(q, 6, 32, _half(b, 208), sub_d=b[..., 192:208].contiguous().view(torch.int8).flatten(1))


_TYPES: dict[str, tuple[int, Callable[[Tensor], Quants]]] = {
    "Q4_0": (18, _q4(2, 8)),
    "Q4_1": (20, _q4(4, 0)),
    "Q5_0": (22, _q5(2, 16)),
    "Q5_1": (24, _q5(4, 0)),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
"""Type -> bytes of a block, and what takes rows of blocks u8 [O, blocks, bytes] apart."""
TYPES = frozenset(_TYPES)
