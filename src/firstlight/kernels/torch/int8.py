"""Int8 linears: both operands in 8 bits, sums exact in int32, so a row's bits are its own whatever surrounds it.

Weights have one scale an output channel, inputs one a row (rows8.py). oneDNN multiplies by the first and rounds to
bfloat16; the second is left to whoever reads the product, so that it costs no pass over memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType

import torch
from torch import Tensor

from firstlight.kernels.rows8 import ZERO_POINT, Rows8
from firstlight.kernels.torch.ops import PackedLinears

_LEAST = 1e-12
"""Of a mean square: channels that are always zero don't count."""


class Int8Linears:
    """`Linears` with int8 weights, but for those that stay in the compute type."""

    def __init__(
        self, weights: Mapping[str, Tensor], spread: Mapping[str, Tensor], plain: Collection[str], ops: ModuleType
    ) -> None:
        """`weights`: name -> bf16 [O, I]; `plain`: names that stay bf16; `ops`: the backend that quantises.

        `spread`: name -> mean square of each channel of the rows that the linear reads, f32 [I], where it is known.
        """
        self._plain = PackedLinears({name: weights[name] for name in plain})
        self.dtype = self._plain.dtype
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        self._ops = ops
        self._smooth: dict[str, Tensor] = {}
        self._packed: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name in (name for name in weights if name not in plain):
            weight = weights[name].float()
            self._smooth[name] = smoothing(weight, spread.get(name))
            self._packed[name] = self._pack(weight / self._smooth[name])

    def reads(self, name: str) -> Tensor | None:
        """The smoothing vector of the rows that a linear reads in 8 bits; None if it reads the compute type."""
        return self._smooth.get(name)

    def __call__(self, name: str, x: Tensor | Rows8) -> Tensor:
        """x [n, I] -> [n, O]."""
        rows, scale = self.scaled(name, x)
        if scale is not None:
            self._ops.scale_rows(rows, scale)
        return rows

    def scaled(self, name: str, x: Tensor | Rows8) -> tuple[Tensor, Tensor | None]:
        """x [n, I] -> [n, O], and what its rows are still to be multiplied by, f32 [n]; None if by nothing."""
        if name not in self._packed:
            assert isinstance(x, Tensor)
            return self._plain(name, x), None
        values, scale = x if isinstance(x, Rows8) else self._ops.quantise(x, self._smooth[name])
        weight, steps, zeros = self._packed[name]
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(values, 1.0, ZERO_POINT, weight, steps, zeros, None, 1.0, 0, self.dtype, "none", [], "")
        )
        return out[: len(scale)], scale

    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f32 [O, I] -> packed values, scales f32 [O] and zero points [O]."""
        outputs, width = weight.shape
        rows = self._ops.quantise(weight, torch.ones(width))
        signed = rows.values[:outputs].bitwise_xor(ZERO_POINT).view(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(signed, None)
        return packed, rows.scale, torch.zeros(outputs, dtype=torch.int32)


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
