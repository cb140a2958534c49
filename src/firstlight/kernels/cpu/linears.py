"""Linears on our own product (csrc/matmul.cpp): one packed copy of the weights, for a prefill and for a single row.

A row's bits depend neither on the rows beside it nor on threads. On a machine with AMX bf16 and int8 products are left
to oneDNN, whose speed on tiles is known (ours isn't yet: decision 0019), unless `--deterministic` keeps it off them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.kernels.blocks import Stored
from firstlight.kernels.cpu.blocks import Blocks
from firstlight.kernels.memory import empty
from firstlight.kernels.native import lib
from firstlight.kernels.rows8 import ZERO_POINT
from firstlight.kernels.tape import Own
from firstlight.kernels.torch import int8, ops
from firstlight.kernels.torch.ops import Parts, Product

_PANEL = 64
_GROUP_BYTES = 4
"""Of inner scalars that lie side by side: what one dot-product step takes."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def has_tiles() -> bool:
    """Whether oneDNN multiplies bf16 and int8 with AMX here."""
    return "ONEDNN_MAX_CPU_ISA" not in os.environ and torch.cpu._is_amx_tile_supported()


class Panels:
    """A linear's weights in panels of 64 outputs, [O / 64, I / G, 64, G], with zeros past the last output or input."""

    def __init__(self, w: Tensor, scale: Tensor | None = None) -> None:
        """`scale`: what a unit of each output is worth, f32 [O], where weights are int8."""
        self._set(self.packed(w, scale))

    @classmethod
    def of(cls, parts: Parts) -> Panels:
        """What `packed` made, ready to run."""
        panels = cls.__new__(cls)
        panels._set(parts)
        return panels

    @staticmethod
    def packed(w: Tensor, scale: Tensor | None = None) -> Parts:
        """The weights as they are kept: panels and shape; of int8 ones outputs' scales and what their sums start at."""
        outputs, width = w.shape
        group = _GROUP_BYTES // w.element_size()
        missing, more = -width % group, -outputs % _PANEL
        padded = F.pad(w, (0, missing, 0, more)) if missing or more else w.contiguous()
        groups = padded.view(torch.int32).view(-1, _PANEL, padded.shape[1] // group)
        panels = groups.transpose(1, 2).contiguous()
        parts = {"panels": panels.view(w.dtype).view(*panels.shape, group), "shape": torch.tensor([outputs, width])}
        if scale is None:
            return parts
        start = padded.sum(1, dtype=torch.int32) * -ZERO_POINT
        return {**parts, "scale": F.pad(scale, (0, more)), "start": start}

    def _set(self, parts: Parts) -> None:
        self.outputs, self.width = self.shape = tuple(parts["shape"].tolist())
        self._panels, self._scale, self._start = parts["panels"], parts.get("scale"), parts.get("start")
        self._kind, group = _KINDS[self._panels.dtype], self._panels.shape[-1]
        self._missing = -self.width % group
        self.pads = self._missing > 0
        """Whether its input must be made wider first."""
        self._operands = tuple(map(_address, (self._panels, self._scale, self._start)))
        self.own = Own((self.shape, self._kind), tuple(filter(None, self._operands)))
        """Of its calls."""
        self._words = self._panels.view(torch.int32)[..., 0].numpy()
        """[O / 64, I / G, 64]: numpy picks rows at a fifth of what it takes PyTorch after a decode step."""

    def __call__(self, x: Tensor, out: Tensor | None = None, wide: bool = False) -> Tensor:
        """x [n, I] -> [n, O], float32 if `wide`; otherwise of x's type, and bf16 where that is bytes around 128."""
        assert lib is not None and x.stride(1) == 1
        if self._missing:
            x = F.pad(x, (0, self._missing))
        dtype = torch.float32 if wide or self._kind == 0 else torch.bfloat16
        out = empty((x.shape[0], self.outputs), dtype) if out is None else out
        n, width = out.shape[0], x.shape[1]  # `len` of a tensor is Python, and takes a microsecond
        panels, scale, start = self._operands
        where = (x.data_ptr(), panels, out.data_ptr(), x.stride(0), out.stride(0), n, width, self.outputs)
        lib.matmul(*where, torch.get_num_threads(), self._kind, wide, scale, start, 0)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """ids i64 [..] -> these outputs' weights [.., I]."""
        at = ids.numpy()
        words = torch.empty(*ids.shape, self._words.shape[1], dtype=torch.int32)
        words.numpy()[...] = self._words[at // _PANEL, :, at % _PANEL]
        rows = words.view(self._panels.dtype)
        return rows[..., : self.width] if self._missing else rows


def layout(dtype: torch.dtype) -> str:
    """What `PackedLinears.parts` makes of weights of this type, in a word."""
    return "rows" if dtype != torch.float32 and has_tiles() else "panels"


class PackedLinears(ops.PackedLinears):
    """`Linears` over one packed copy of the weights."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__(weights)
        _trim()

    @property
    def all_kernels(self) -> bool:
        return all(map(_is_kernel, self._packed.values()))

    def own(self, name: str) -> Own:
        """What calls have of a linear's own."""
        product = self._packed[name]
        assert isinstance(product, Panels | Blocks)
        return product.own

    def parts(self, name: str, joined: Sequence[Tensor | Stored]) -> Parts:
        stored = [w for w in joined if isinstance(w, Stored)]
        if len(stored) == len(joined):
            return Blocks.packed(stored)
        rows = ops.join([_plain(w) for w in joined])
        return {"rows": rows} if layout(rows.dtype) == "rows" else Panels.packed(rows)

    def take(self, name: str, parts: Parts) -> None:
        super().take(name, parts)
        for made in ("panels", "blocks"):
            if made in parts:
                self.dtype = parts[made].dtype

    def logits(self, x: Tensor) -> Tensor:
        """x [n, I] -> the head's product f32 [n, O]: its sums as they are."""
        head = self._packed["head"]
        return head(x, wide=True) if isinstance(head, Panels | Blocks) else super().logits(x)

    def head_rows(self, ids: Tensor) -> Tensor:
        """ids i64 [..] -> these rows of the head's weights [.., I]: a tied embedding."""
        head = self._packed["head"]
        return head.rows(ids) if isinstance(head, Panels | Blocks) else super().head_rows(ids)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """ids i64 [..] -> these rows of a linear's weights [.., I], which are blocks."""
        blocks = self._packed[name]
        assert isinstance(blocks, Blocks)
        return blocks.rows(ids)

    def _revived(self, parts: Parts) -> Product:
        if "blocks" in parts:
            return Blocks(parts)
        return Panels.of(parts) if "panels" in parts else super()._revived(parts)


class Int8Linears(int8.Int8Linears):
    """`Linears` with int8 weights, but for those that stay in the compute type."""

    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        spread: Mapping[str, Tensor],
        plain: Collection[str],
        ops: ModuleType,
    ) -> None:
        super().__init__(weights, spread, plain, ops)
        _trim()

    @property
    def all_kernels(self) -> bool:
        return all(map(_is_kernel, self._packed.values())) and self._plain.all_kernels

    def own(self, name: str) -> Own:
        """What calls have of a linear's own."""
        if name not in self._packed:
            own: Own = self._plain.own(name)
            return own
        product = self._packed[name]
        assert isinstance(product, Panels)
        return Own(product.own.form, (*product.own.addresses, self._smooth[name].data_ptr()))

    def _packed_parts(self, values: Tensor, scale: Tensor) -> Parts:
        return super()._packed_parts(values, scale) if has_tiles() else Panels.packed(values, scale)

    def _revived(self, parts: Parts) -> Product:
        return Panels.of(parts) if "panels" in parts else super()._revived(parts)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x [n, I], w [O, I] -> x w^T [n, O]."""
    return _product(w)(x)


def _plain(w: Tensor | Stored) -> Tensor:
    if isinstance(w, Tensor):
        return w
    blocks = Blocks(Blocks.packed([w]))
    return blocks.rows(torch.arange(blocks.shape[0]))


def _product(w: Tensor) -> Product:
    return ops.OneDnn(w) if layout(w.dtype) == "rows" else Panels(w)


def _is_kernel(product: Product) -> bool:
    return isinstance(product, Blocks) or (isinstance(product, Panels) and not product.pads)


def _trim() -> None:
    """Give back what packing needed for a moment: holes in the heap, as large as the weights."""
    assert lib is not None
    lib.trim()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
