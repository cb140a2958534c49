"""Linears straight from the blocks of a GGUF file: nothing larger than those is ever in memory.

The product (csrc/matmul.cpp) makes a few kilobytes of a panel from them just before rows stream by, in the same
rounding and order as if that panel had lain in memory: its bits are those of `Panels` over the weights unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.kernels.blocks import Quants, Stored, unpacked
from firstlight.kernels.memory import empty
from firstlight.kernels.native import lib
from firstlight.kernels.tape import Own
from firstlight.kernels.torch.ops import Parts

_PANEL = 64
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_PLANES = ("low", "high", "d", "m", "sub_d", "sub_m")


class Blocks:
    """A linear of one or more matrices [O, I] of blocks that share an input; those of one type are one piece."""

    def __init__(self, parts: Parts) -> None:
        """`parts`: what `packed` made."""
        self._pieces = [_Piece(parts, number) for number in range(sum(name.endswith(".form") for name in parts))]
        self.dtype = parts["blocks"].dtype
        self.shape: tuple[int, ...] = (sum(piece.outputs for piece in self._pieces), self._pieces[0].width)
        form = (self.shape, self.dtype, *[piece.outputs for piece in self._pieces])
        self.own = Own(form, tuple(piece.address for piece in self._pieces))
        """Of its calls: bits and planes of a piece lie behind its address."""

    @staticmethod
    def packed(joined: Sequence[Stored]) -> Parts:
        """Weights as they are kept: bytes of the file in the order in which products read them."""
        parts = {"blocks": torch.empty(0, dtype=joined[0].dtype)}
        for number, stored in enumerate(_by_type(joined)):
            made = _planes(unpacked(stored))
            parts |= {f"{number}.{name}": plane for name, plane in made.items()}
        return parts

    def __call__(self, x: Tensor, out: Tensor | None = None, wide: bool = False) -> Tensor:
        """x [n, I] -> [n, O] of x's type, float32 if `wide`."""
        assert lib is not None and x.stride(1) == 1
        n, (outputs, width) = len(x), self.shape
        out = empty((n, outputs), torch.float32 if wide else self.dtype) if out is None else out
        first, how = out.data_ptr(), (torch.get_num_threads(), _KINDS[self.dtype], wide, 0, 0)
        for piece in self._pieces:
            where = (x.data_ptr(), 0, first, x.stride(0), out.stride(0), n, width, piece.outputs)
            lib.matmul(*where, *how, piece.address)
            first += piece.outputs * out.itemsize
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """ids i64 [..] -> these outputs' weights [.., I]; of a linear in one piece."""
        [piece] = self._pieces
        return piece.rows(ids.flatten()).to(self.dtype).view(*ids.shape, -1)


class _Piece:
    """Panels of one type, and the addresses that the product takes (`Blocks` in csrc/matmul.h)."""

    def __init__(self, parts: Parts, number: int) -> None:
        self._planes = {name: plane for name in _PLANES if (plane := parts.get(f"{number}.{name}")) is not None}
        form = parts[f"{number}.form"].tolist()
        self.outputs, self.width, self._bits, self._zero, self._super, self._sub = form
        addresses = [self._planes[name].data_ptr() if name in self._planes else 0 for name in _PLANES]
        self._call = torch.tensor([*addresses, *form[2:]])
        self.address = self._call.data_ptr()

    def rows(self, ids: Tensor) -> Tensor:
        """ids i64 [n] -> f32 [n, I]: the same numbers as the product's."""
        at = {name: plane[ids // _PANEL, :, ids % _PANEL] for name, plane in self._planes.items()}
        d = self._spread(at["d"].float(), self._super)
        if "sub_d" in at:
            d = d * self._spread(at["sub_d"].float(), self._sub)
        m = self._spread(at["m"].float(), self._super) if "m" in at else d * -self._zero
        if "sub_m" in at:
            m = m * self._spread(at["sub_m"].float(), self._sub)
        return self._q(at) * d + m

    def _spread(self, plane: Tensor, size: int) -> Tensor:
        return plane.repeat_interleave(size, -1)

    def _q(self, at: Parts) -> Tensor:
        low, width = at["low"].view(torch.uint8), self.width
        if self._bits == 8:
            return low.float()
        q = torch.stack([low & 15, low >> 4], -1).view(-1, width)
        if "high" in at:
            step = self._bits - 4
            shifts = torch.arange(0, 8, step, dtype=torch.uint8)
            q = q | (((at["high"].view(torch.uint8)[..., None] >> shifts) & (1 << step) - 1) << 4).view(-1, width)
        return q.float()


def _by_type(joined: Sequence[Stored]) -> Iterator[Stored]:
    """The same in fewer pieces: neighbours of one type become one."""
    start = 0
    for end in range(1, len(joined) + 1):
        if end == len(joined) or joined[end].type != joined[start].type:
            raw = [stored.raw for stored in joined[start:end]]
            yield Stored(joined[start].type, raw[0] if len(raw) == 1 else torch.cat(raw), joined[start].dtype)
            start = end


def _planes(w: Quants) -> Parts:
    """Panels of each thing that a weight is made of, and the numbers that say how."""
    form = [*w.q.shape, w.bits, w.zero, w.super, w.sub]
    made = {"form": torch.tensor(form), "low": _panels(_words(w)), "d": _panels(w.d)}
    if w.bits in (5, 6):
        made["high"] = _panels(_high(w.q >> 4, w.bits - 4))
    for name, plane in (("m", w.m), ("sub_d", w.sub_d), ("sub_m", w.sub_m)):
        if plane is not None:
            made[name] = _panels(plane)
    return made


def _words(w: Quants) -> Tensor:
    """Low bits in words of one output, the lowest first: i32 [O, I / 8], or I / 4 of 8 bits."""
    low = w.q if w.bits == 8 else (w.q[:, ::2] & 15) | (w.q[:, 1::2] << 4)
    return low.contiguous().view(torch.int32)


def _high(q: Tensor, bits: int) -> Tensor:
    """u8 [O, I] of one or two bits -> those of 8 side by side, u8 or i16 [O, I / 8]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed: Tensor = (q.view(len(q), -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
    return packed if bits == 1 else packed.contiguous().view(torch.int16)


def _panels(plane: Tensor) -> Tensor:
    """[O, n] -> [O / 64, n, 64], with zeros past the last output."""
    padded = F.pad(plane, (0, 0, 0, -len(plane) % _PANEL))
    return padded.view(-1, _PANEL, plane.shape[1]).transpose(1, 2).contiguous()
