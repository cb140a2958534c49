"""Int8 linears: both operands in 8 bits, sums exact in int32, so a row's bits are its own whatever surrounds it.

Weights have one scale an output channel, inputs one a row (rows8.py). The product multiplies by the first and rounds to
bfloat16; the second is left to whoever reads it, so that it costs no pass over memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from firstlight.kernels.rows8 import ZERO_POINT, Rows8
from firstlight.kernels.torch.ops import Parts, Product, join, placed

_LEAST = 1e-12
"""Of a mean square: channels that are always zero don't count."""


class Int8Linears:
    """`Linears` with int8 weights, but for those that stay in the compute type."""

    @property
    def all_kernels(self) -> bool:
        """Whether a product does nothing but call compiled kernels."""
        return False

    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        spread: Mapping[str, Tensor],
        plain: Collection[str],
        ops: ModuleType,
    ) -> None:
        """`weights`: names and bf16 [O, I]; `plain`: those whose name's last part is one of these stay bf16.

        `spread`: name -> mean square of each channel of the rows that the linear reads, f32 [I], where it is known;
        `ops`: the backend, which rounds and runs those that stay bf16.
        """
        self._ops, self._plain, self._spread, self._names = ops, ops.PackedLinears(), spread, frozenset(plain)
        self.dtype = torch.bfloat16
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._smooth: dict[str, Tensor] = {}
        self._packed: dict[str, Product] = {}
        for name, w in weights:
            self.take(name, self.parts(name, [w]))

    def parts(self, name: str, joined: Sequence[Tensor]) -> Parts:
        """Weights [O, I] of one input, to be one linear: as they are kept."""
        if name.rpartition(".")[2] in self._names:
            plain: Parts = self._plain.parts(name, joined)
            return plain
        w = join(joined).float()
        smooth = smoothing(w, self._spread.get(name))
        return {"smooth": smooth, **self._packed_parts(*self._rounded(w / smooth))}

    def take(self, name: str, parts: Parts) -> None:
        """One more linear, of its parts."""
        if "smooth" not in parts:
            self._plain.take(name, parts)
            self.shapes[name] = self._plain.shapes[name]
            return
        self._smooth[name] = parts["smooth"].clone()  # no view: where weights are packed anew the file is let go
        self._packed[name] = self._revived(parts)
        self.shapes[name] = self._packed[name].shape

    def reads(self, name: str) -> Tensor | None:
        """The smoothing vector of the rows that a linear reads in 8 bits; None if it reads the compute type."""
        return self._smooth.get(name)

    def __call__(self, name: str, x: Tensor | Rows8) -> Tensor:
        """x [n, I] -> [n, O]."""
        rows, scale = self.scaled(name, x)
        if scale is not None:
            self._ops.scale_rows(rows, scale)
        return rows

    def scaled(self, name: str, x: Tensor | Rows8, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [n, I] -> [n, O], and what its rows are still to be multiplied by, f32 [n]; None if by nothing.

        Into `out`, if that is given.
        """
        if name not in self._packed:
            assert isinstance(x, Tensor)
            plain: Tensor = self._plain(name, x, out)
            return plain, None
        values, scale = x if isinstance(x, Rows8) else self._ops.quantise(x, self._smooth[name])
        return self._packed[name](values, out)[: len(scale)], scale

    def logits(self, x: Tensor) -> Tensor:
        """x [n, I] -> the head's product f32 [n, O]."""
        made: Tensor = self._plain.logits(x)
        return made

    def head_rows(self, ids: Tensor) -> Tensor:
        """ids i64 [..] -> these rows of the head's weights [.., I]: a tied embedding."""
        rows: Tensor = self._plain.head_rows(ids)
        return rows

    def _rounded(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w f32 [O, I] -> s8 [O, I], and what one step of each row is worth, f32 [O]."""
        rows = self._ops.quantise(w, torch.ones(w.shape[1]))
        return rows.values[: len(w)].bitwise_xor(ZERO_POINT).view(torch.int8), rows.scale

    def _packed_parts(self, values: Tensor, scale: Tensor) -> Parts:
        """Weights s8 [O, I] and their outputs' scales f32 [O], as they are kept."""
        return {"values": values, "scale": scale}

    def _revived(self, parts: Parts) -> Product:
        return OneDnn8(parts["values"], parts["scale"])


class OneDnn8:
    """An int8 linear on oneDNN: values u8 [n, I] around 128 -> bf16 [n, O]."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.shape = tuple(values.shape)
        self._packed = torch.ops.onednn.qlinear_prepack(values, None)
        self._scale, self._zeros = scale.clone(), torch.zeros(len(values), dtype=torch.int32)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        operands = (x, 1.0, ZERO_POINT, self._packed, self._scale, self._zeros)
        made: Tensor = torch.ops.onednn.qlinear_pointwise(*operands, None, 1.0, 0, torch.bfloat16, "none", [], "")
        return placed(made, out)


def smoothing(weight: Tensor, spread: Tensor | None) -> Tensor:
    """weight f32 [O, I], mean squares of its input f32 [I] -> what the input is multiplied by, powers of two f32 [I].

    Rounding adds noise as large as (|x| of a row) x (|w| of a channel's weights); of all divisions of the work between
    the two the one that makes both equally long in each channel adds least. Powers of two keep the weights' bits, and
    the answer doesn't hang on the last bits of what was measured.
    """
    if spread is None:
        return torch.ones(weight.shape[1])
    ratio = (weight.square().mean(0) + _LEAST) / (spread + _LEAST)
    exponent = ratio.log2() / 4
    return torch.exp2((exponent - exponent.mean()).round())
