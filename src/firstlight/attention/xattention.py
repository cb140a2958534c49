"""`xattention`: blocks are scored by the sums of their antidiagonals, and a row of blocks reads those that hold most.

XAttention (arXiv 2503.16428, section 2). A line of hot keys, vertical or diagonal, crosses an antidiagonal wherever it
crosses a cell of `stride` x `stride`, so one of `stride` products of a cell is enough to find it, and all antidiagonals
of a tile are one matrix product: queries in reversed order beside each other, keys in order.

What is softmaxed is the mean logit of an antidiagonal. So `tau` is no share of attention mass; `firstlight calibrate`
finds for each head the tau that brings a given share. An antidiagonal of even stride has odd distances only, and a
diagonal one token wide at an even distance is never seen: with `alternating` every second cell takes even distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.attention.grid import Grid
from firstlight.core.attn import AttnPlan, PlanContext, Planner
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, ModelFacts

TAU = 0.9
BLOCKS = (16, 32, 64, 128, 256)
_CELLS = 256
"""Rows of cells that are scored at a time."""


@dataclass(frozen=True)
class XAttentionConfig:
    """Raises UserError on values that can't be."""

    tau: float | None = field(
        default=None,
        metadata={"doc": f"share of the scores that is read; 1 = all; default: calibrated for each head, else {TAU}"},
    )
    stride: int = field(default=8, metadata={"doc": "one product of so many is made: 4 is finest, 16 is fast"})
    block: int = field(default=128, metadata={"doc": f"rows and tokens of a block, one of {BLOCKS}"})
    alternating: bool = field(default=False, metadata={"doc": "look at even distances too, in every second cell"})

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise UserError(f"xattention: tau={self.tau} is no share; give 0 to 1")
        if self.block not in BLOCKS:
            raise UserError(f"xattention: block={self.block} can't be; choose one of {', '.join(map(str, BLOCKS))}")
        if self.stride < 1 or self.block % self.stride:
            raise UserError(f"xattention: stride={self.stride} doesn't divide block={self.block}; give 4, 8 or 16")


class XAttention(Planner):
    """The attention part: for each query head and tile of rows a list of blocks, the first and the own always in it."""

    name = "xattention"
    seam = "attention"
    prompt_only = True
    Config = XAttentionConfig
    identity: ClassVar = {"tau": 1.0}
    trial: ClassVar = {"stride": 4, "block": 16}
    # A tile's list hangs on all its rows in the pass: on the later ones, and on where a chunk cuts it.
    capability = Capability(exact=False, prefix_stable=False, chunk_invariant=False, looks=True, calibration=True)

    def __init__(self, config: XAttentionConfig) -> None:
        self.config = config
        self._taus: list[list[float]] | None = None
        """[layers][Hq], where they were calibrated for this stride and block."""

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        if calibration is None or self.config.tau is not None:
            return
        made_for = calibration.value("stride", int), calibration.value("block", int)
        if made_for == (self.config.stride, self.config.block) and not self.config.alternating:
            self._taus = _table(calibration, model)

    @staticmethod
    def sample(model: ModelFacts) -> dict[str, Any]:
        """Shares for a check on a model that has none."""
        taus = [[0.3 + (5 * i + h) % 4 / 10 for h in range(model.num_heads)] for i in range(model.num_layers)]
        return {"tau": taus, "stride": 4, "block": 16}

    def tau(self, layer: int, num_heads: int) -> Tensor:
        """f32 [Hq]."""
        if self._taus is not None:
            return torch.tensor(self._taus[layer])
        return torch.full((num_heads,), TAU if self.config.tau is None else self.config.tau)

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) where every block is read anyway."""
        tau = self.tau(ctx.layer, ctx.q.shape[1])
        if ctx.place is None or float(tau.min()) >= 1:
            return None
        grid = Grid(ctx, self.config.block, self.config.block)
        forced = grid.diagonal | (grid.causal & (torch.arange(grid.num_blocks) == 0))
        if bool((forced == grid.causal).all()):
            return None
        mass = block_mass(ctx, grid, self.config.stride, self.config.alternating)
        return grid.plan(blocks=cover(mass, forced, tau) & grid.causal)

    def operations(self, ctx: PlanContext) -> float:
        """Those of `block_mass`, which sees nothing behind a tile's own block."""
        pairs = float((ctx.tok + self.config.block).sum()) / self.config.stride
        return 2.0 * pairs * ctx.q.shape[1] * ctx.q.shape[2]

    def rehearse(self, ctx: PlanContext) -> float:
        """Products as large as these are faster than a probe's."""
        block_mass(ctx, Grid(ctx, self.config.block, self.config.block), self.config.stride, self.config.alternating)
        return self.operations(ctx)


def block_mass(ctx: PlanContext, grid: Grid, stride: int, alternating: bool = False) -> Tensor:
    """f32 [Hq, tiles, nb]: the softmaxed antidiagonals of each block, summed; a full tile's row sums to blk / stride.

    Cells without a row count nothing. Others are compared with the cells up to the one of their last row's own entry.
    """
    heads, group = ctx.q.shape[1], ctx.q.shape[1] // ctx.num_kv_heads
    cells = _Cells.of(ctx, grid, stride)
    keys = _key_cells(ctx, grid, stride, alternating)
    mass = torch.zeros(heads, grid.tiles, grid.num_blocks)
    for tiles, blocks in _strips(grid, stride):
        rows, n = slice(tiles.start * cells.per_block, tiles.stop * cells.per_block), blocks * cells.per_block
        ahead = torch.arange(n) > cells.last[rows, None]
        for h, k in enumerate(keys[:, :n]):
            own = slice(h * group, (h + 1) * group)
            scores = (cells.q[own, rows].flatten(0, 1) @ k.T).float().view(group, -1, n).mul_(cells.scale[rows, None])
            share = scores.masked_fill_(ahead, -torch.inf).softmax(-1).nan_to_num_(0.0)
            in_blocks = share.view(group, -1, blocks, cells.per_block).sum(-1)
            mass[own, tiles, :blocks] = in_blocks.view(group, -1, cells.per_block, blocks).sum(2)
    return mass


def cover(mass: Tensor, forced: Tensor, tau: Tensor) -> Tensor:
    """bool [Hq, tiles, nb]: forced blocks, then the best others while those before have less than tau [Hq] of all.

    Of equal blocks the first are taken first.
    """
    order = mass.masked_fill(forced, torch.inf).argsort(stable=True, dim=-1, descending=True)
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    share = tau[:, None, None]
    taken = (before < share * mass.sum(-1, keepdim=True)) | (share >= 1)
    return torch.zeros_like(taken).scatter_(-1, order, taken) | forced


@dataclass(frozen=True)
class _Cells:
    """A pass's rows in cells of `stride` ordinals, from the first tile's first one on."""

    q: Tensor
    """[Hq, cells, stride D]: the rows of each cell beside each other, the last first; zeros where there is no row."""
    scale: Tensor
    """f32 [cells]: from a sum over an antidiagonal to the mean logit of the rows that are there."""
    last: Tensor
    """i64 [cells]: the key cell of the last row's own entry; -1 where there is no row."""
    per_block: int

    @staticmethod
    def of(ctx: PlanContext, grid: Grid, stride: int) -> _Cells:
        per_block = grid.blk // stride
        at = ctx.tok - grid.first * grid.q_tile
        num, cell = grid.tiles * per_block, at // stride
        heads, dim = ctx.q.shape[1:]
        q = ctx.q.new_zeros(heads, num * stride, dim)
        q[:, (cell + 1) * stride - 1 - at % stride] = ctx.q.transpose(0, 1)
        rows = torch.bincount(cell, minlength=num)
        last = torch.full((num,), -1).scatter_reduce_(0, cell, grid.place // stride, "amax")
        return _Cells(q.view(heads, num, stride * dim), ctx.scale / rows.clamp(min=1), last, per_block)


def _key_cells(ctx: PlanContext, grid: Grid, stride: int, alternating: bool) -> Tensor:
    """[Hkv, cells, stride D]: the keys of each cell beside each other, zeros past the last entry.

    The product with a cell's rows, the last of which is first, sums q[i] k[j] over i + j = stride - 1. With
    `alternating` odd cells begin with their last key: i + j = stride - 2 modulo stride, and distances there are even.
    """
    keys = ctx.keys()[:, : grid.num_entries].to(ctx.q.dtype)
    keys = pad(keys, (0, 0, 0, grid.num_blocks * grid.blk - keys.shape[1]))
    cells = keys.view(len(keys), -1, stride, keys.shape[2])
    if alternating:
        cells = torch.where((torch.arange(cells.shape[1]) % 2 == 1)[:, None, None], cells.roll(1, 2), cells)
    return cells.flatten(2)


def _strips(grid: Grid, stride: int) -> Iterator[tuple[slice, int]]:
    """Tiles that are scored together, and how many blocks any of them may read."""
    step = max(_CELLS * stride // grid.q_tile, 1)
    for begin in range(0, grid.tiles, step):
        tiles = slice(begin, min(begin + step, grid.tiles))
        if blocks := int(grid.causal[tiles].sum(1).max()):
            yield tiles, blocks


def _table(calibration: Calibration, model: ModelFacts) -> list[list[float]]:
    """[layers][Hq]. Raises UserError if it is of another shape."""
    table = calibration.value("tau", list)
    if len(table) != model.num_layers or any(len(row) != model.num_heads for row in table):
        raise UserError(
            f"the calibration {calibration.path} has no tau for each head of each layer; "
            "make one with `firstlight calibrate MODEL xattention`"
        )
    return table
