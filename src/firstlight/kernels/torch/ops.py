"""Row-local operators and prepacked linears on PyTorch.

Every operator here gives a row the same bits whatever rows and threads surround it. Two things of PyTorch's break that
and are avoided: float32 `F.linear` (its blocking follows the row count) and operators whose vectorised and scalar
forms differ (`silu` and `sigmoid` in float32: built from `exp` here).

Around int8 linears rows come with a `scale` f32 [n] that they are still to be multiplied by, and leave as `Rows8` where
`smooth`, the smoothing vector of the linear that reads them, is given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.kernels.rows8 import MIN_ROWS, Rows8
from firstlight.kernels.torch.quantise import quantise

_PROBE_ROWS = (1, MIN_ROWS, 16, 97, 256)
_PACK_ROWS = 512
"""The row count that oneDNN picks its weight layout for."""
_RESCORED = 64
"""Tokens a row whose logits are made in float32."""


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [n, D] -> [n, D], scaled to unit mean square, times gain f32 [D]; float32 inside."""
    return F.rms_norm(x.float(), (x.shape[-1],), gain, eps).to(x.dtype)


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    smooth: Tensor | None = None,
) -> Tensor | Rows8:
    """Residual x f32 [n, D] += delta [n, D] in place, if given; then `rms_norm` of x as `dtype` [n, D]."""
    if delta is not None:
        add_rows(x, delta, scale)
    return _given(rms_norm(x, gain, eps), dtype, smooth)


def add_rows(x: Tensor, delta: Tensor, scale: Tensor | None = None) -> None:
    """Residual x f32 [n, D] += delta [n, D]."""
    x.add_(delta if scale is None else _scaled(delta, scale))


def scale_rows(x: Tensor, scale: Tensor) -> None:
    """x [n, ..] *= scale f32 [n], in place."""
    x.copy_(_scaled(x, scale))


def shift_rows(x: Tensor, by: Tensor) -> None:
    """x [n, ..] += by f32 [..] in each row, in place."""
    x.copy_(x.float() + by)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """RoPE on halves, in place (arXiv 2104.09864, eq. 34). x [n, H, D] -> x; cos, sin f32 [n, D], sin signed.

    With `gain` f32 [H, D] each head goes through `rms_norm` first.

    One rounding an operator: a fused multiply-add rounds once where it is vectorised and twice where it is not.
    """
    wide = x.to(torch.float32, copy=True) if scale is None else _scaled(x, scale)
    if gain is not None:
        wide = F.rms_norm(wide, (x.shape[-1],), None, eps).mul_(gain)
    other = wide.roll(x.shape[-1] // 2, -1).mul_(sin[:, None])
    return x.copy_(wide.mul_(cos[:, None]).add_(other))


def silu_mul(gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Tensor | Rows8:
    """gate_up [n, 2F], gate first -> silu(gate) * up [n, F]."""
    gate, up = (gate_up if scale is None else _scaled(gate_up, scale)).chunk(2, dim=-1)
    if gate.dtype == torch.float32:
        gated = torch.div(gate, torch.neg(gate).exp_().add_(1)).mul_(up)
    else:
        gated = F.silu(gate).mul_(up)
    return _given(gated, gate_up.dtype, smooth)


def gelu_mul(gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Tensor | Rows8:
    """gate_up [n, 2F], gate first -> gelu(gate) * up [n, F], GELU in its tanh form (arXiv 1606.08415).

    (1 + tanh(u)) / 2 is the logistic of 2u; one rounding an operator, for the same reason as in `rotate`.
    """
    wide = gate_up.float() if scale is None else _scaled(gate_up, scale)
    gate, up = wide.chunk(2, dim=-1)
    cubed = torch.mul(gate, gate).mul_(gate).mul_(0.044715).add_(gate)
    gated = torch.div(gate, cubed.mul_(-1.5957691216057308).exp_().add_(1))
    return _given(gated.mul_(up), gate_up.dtype, smooth)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [n, ..] times scale f32 [n], in float32."""
    return x.float() * scale.view(-1, *(1,) * (x.dim() - 1))


def _given(x: Tensor, dtype: torch.dtype, smooth: Tensor | None) -> Tensor | Rows8:
    """Rows [n, I] as they leave an operator."""
    return x.to(dtype) if smooth is None else quantise(x, smooth)


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), of operators whose vectorised and scalar forms agree."""
    return cap - 2 * cap / (torch.exp(x * (2 / cap)) + 1)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x [n, I], w [O, I] (plain or packed) -> x w^T [n, O]; few rows are padded to MIN_ROWS."""
    if x.dtype != _multiplied(x.dtype):
        return linear(x.float(), w if w.is_mkldnn else w.float()).to(x.dtype)
    n = x.shape[0]
    if n < MIN_ROWS:
        return linear(F.pad(x, (0, 0, 0, MIN_ROWS - n)), w)[:n]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return out


@functools.cache
def _multiplied(dtype: torch.dtype) -> torch.dtype:
    """What oneDNN multiplies numbers of this type as: it has no products of bf16 below AVX-512."""
    narrow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if narrow else dtype


class OneDnn:
    """A linear's weights in oneDNN's own layout, which can't be kept: packed at each start."""

    def __init__(self, w: Tensor) -> None:
        self.shape = tuple(w.shape)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(w.to(_multiplied(w.dtype)), _PACK_ROWS)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [n, I] -> [n, O]."""
        return placed(linear(x, self._packed), out)


class Product(Protocol):
    """A linear that is ready to run: x [n, I] -> [n, O], into `out` if that is given."""

    shape: tuple[int, ...]
    """O, I."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...


Parts = dict[str, Tensor]
"""A linear as it is kept between two starts: what a `Product` is made of, by names that say which."""


def layout(dtype: torch.dtype) -> str:
    """What `PackedLinears.parts` makes of weights of this type, in a word."""
    return "rows"


class PackedLinears:
    """`Linears` over weights packed once for oneDNN."""

    @property
    def all_kernels(self) -> bool:
        """Whether a product does nothing but call compiled kernels."""
        return False

    def __init__(self, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """`weights`: names and [O, I] in the compute dtype, which nobody need hold once they are packed.

        The one named "head" gives the logits.
        """
        self.dtype = torch.float32
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._packed: dict[str, Product] = {}
        self._head: Tensor | None = None
        for name, w in weights:
            self.take(name, self.parts(name, [w]))

    def parts(self, name: str, joined: Sequence[Tensor]) -> Parts:
        """Weights [O, I] of one input, to be one linear: as they are kept."""
        return {"rows": join(joined)}

    def take(self, name: str, parts: Parts) -> None:
        """One more linear, of its parts; all are of one dtype."""
        self._packed[name] = self._revived(parts)
        self.shapes[name] = self._packed[name].shape
        if "rows" in parts:
            self.dtype = parts["rows"].dtype
            if name == "head":
                self._head = parts["rows"].clone()  # packed weights can't be read, and the others' are let go

    def __call__(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [n, I] -> [n, O], into `out` if that is given."""
        return self._packed[name](x, out)

    def scaled(self, name: str, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, None]:
        """The same; nothing is left to be multiplied by."""
        return self(name, x, out), None

    def reads(self, name: str) -> None:
        """No linear reads 8 bits."""

    def head_rows(self, ids: Tensor) -> Tensor:
        """ids i64 [..] -> these rows of the head's weights [.., I]: a tied embedding."""
        assert self._head is not None
        return self._head[ids]

    def logits(self, x: Tensor) -> Tensor:
        """x [n, I] -> the head's product f32 [n, O].

        In bf16 a logit of 25 is off by up to 0.06, which ties the likeliest tokens: theirs are made anew in float32.
        """
        logits = self("head", x).float()
        if self.dtype == torch.float32:
            return logits
        best = logits.topk(min(_RESCORED, logits.shape[1]), dim=-1).indices
        return logits.scatter_(1, best, torch.mul(self.head_rows(best).float(), x.float()[:, None]).sum(-1))

    def _revived(self, parts: Parts) -> Product:
        return OneDnn(parts["rows"])


def placed(made: Tensor, out: Tensor | None) -> Tensor:
    """A product's rows where they are wanted: for those that can't write there."""
    return made if out is None else out.copy_(made[: len(out)])


def join(weights: Sequence[Tensor]) -> Tensor:
    """[O1, I], [O2, I] .. -> [O, I]."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def dependent_linears(linears: PackedLinears) -> set[str]:
    """Names of linears, one per shape, whose rows' bits change with the row or thread count on this machine."""
    threads, found = torch.get_num_threads(), set()
    for shape, name in {shape: name for name, shape in linears.shapes.items()}.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_PROBE_ROWS[-1], shape[1], generator=generator).to(linears.dtype)
        want = linears(name, x)
        for count in {1, threads}:
            torch.set_num_threads(count)
            if any(not torch.equal(linears(name, x[:n]), want[:n]) for n in _PROBE_ROWS):
                found.add(name)
        torch.set_num_threads(threads)
    return found
