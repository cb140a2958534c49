"""Plan to plan, where rows may see more afterwards and never less: shared lists, joined plans, rows made dense.

Kernels run faster where heads and tiles share a list, and what they then read in common is a choice of its own
(CompactAttention, arXiv 2605.16839): so it stands here, beside no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from firstlight.attention.grid import csr, mask_of
from firstlight.attention.transforms import aligned
from firstlight.core.attn import DENSE, AttnPlan


def coarsen(plan: AttnPlan, heads: int | Tensor = 1, tiles: bool = False) -> AttnPlan:
    """Lists for every `heads` query heads together, and with `tiles` one for all tiles of the pass: each the union.

    heads i64 [Hq], ascending from 0: which heads go together, where that isn't so many everywhere.
    """
    group = torch.arange(len(plan.head_map)) // heads if isinstance(heads, int) else heads
    slots = torch.zeros_like(plan.tile_map).long() if tiles else torch.arange(len(plan.tile_map))
    num_lists, num_slots = int(group[-1]) + 1, int(slots[-1]) + 1
    row = plan.tile_map.long()[:, None] * plan.num_lists + plan.head_map.long()
    into = slots[:, None] * num_lists + group
    shared = replace(plan, head_map=group.to(torch.int16), tile_map=slots.to(torch.int32))
    return _with_lists(shared, [(plan, row.flatten())], into.flatten(), num_slots * num_lists)


def union(one: AttnPlan, other: AttnPlan) -> AttnPlan:
    """What either shows, for plans of one request and one pass."""
    one, other = aligned(one, other)
    slots, tile_map = torch.unique(torch.stack([one.tile_map, other.tile_map]), dim=1, return_inverse=True)
    lists, head_map = torch.unique(torch.stack([one.head_map, other.head_map]), dim=1, return_inverse=True)
    sources = [
        (plan, (slot.long()[:, None] * plan.num_lists + own.long()).flatten())
        for plan, slot, own in zip((one, other), slots, lists)
    ]
    into = torch.arange(slots.shape[1] * lists.shape[1])
    joined = replace(one, head_map=head_map.to(torch.int16), tile_map=tile_map.to(torch.int32))
    return _with_lists(joined, sources, into, len(into))


def to_blocks(plan: AttnPlan) -> AttnPlan:
    """Columns become the blocks that they lie in."""
    if plan.col_ptr is None or plan.col_idx is None:
        return plan
    without = replace(plan, col_ptr=None, col_idx=None)
    touched = replace(without, blk_ptr=plan.col_ptr, blk_idx=plan.col_idx // plan.blk)
    rows = torch.arange(len(plan.band))
    return _with_lists(without, [(without, rows), (touched, rows)], rows, len(rows))


def force(plan: AttnPlan, sink: int, recent: int) -> AttnPlan:
    """All rows see the first `sink` entries and the last `recent` tokens before them as well."""
    return replace(plan, band=_wider(plan.band, torch.tensor([sink, recent], dtype=torch.int32)))


def dense_rows(plan: AttnPlan, first: int) -> AttnPlan:
    """Rows with ordinal `first` or later see everything; so do the others of the first one's tile."""
    dense = torch.arange(len(plan.tile_map)) >= first // plan.q_tile - int(plan.tile_first)
    if not bool(dense.any()):
        return plan
    num_lists, num_slots = plan.num_lists, len(plan.band) // plan.num_lists
    all_of_it = torch.tensor([[0, DENSE]], dtype=torch.int32).expand(num_lists, 2)
    return replace(
        plan,
        tile_map=torch.where(dense, torch.tensor(num_slots, dtype=torch.int32), plan.tile_map),
        band=torch.cat([plan.band, all_of_it]),
        blk_ptr=_with_empty_rows(plan.blk_ptr, num_lists),
        col_ptr=_with_empty_rows(plan.col_ptr, num_lists),
    )


def _with_empty_rows(ptr: Tensor | None, count: int) -> Tensor | None:
    return None if ptr is None else torch.cat([ptr, ptr[-1:].expand(count)])


_Sources = list[tuple[AttnPlan, Tensor]]
"""Plans, and for each a CSR row number for every place of `into`."""


def _with_lists(plan: AttnPlan, sources: _Sources, into: Tensor, num_rows: int) -> AttnPlan:
    """The plan with `num_rows` rows of lists and bands; row into[i] takes in row rows[i] of each (plan, rows)."""
    widest = torch.iinfo(torch.int32).max  # a window of -1
    band = torch.zeros(num_rows, 2, dtype=torch.int32)
    for source, rows in sources:
        given = source.band[rows]
        given = torch.where(given == DENSE, widest, given)
        band.scatter_reduce_(0, into[:, None].expand(-1, 2), given, "amax")
    blk_ptr, blk_idx = _united([(p.blk_ptr, p.blk_idx, rows) for p, rows in sources], into, num_rows)
    col_ptr, col_idx = _united([(p.col_ptr, p.col_idx, rows) for p, rows in sources], into, num_rows)
    band = torch.where(band == widest, DENSE, band)
    return replace(plan, band=band, blk_ptr=blk_ptr, blk_idx=blk_idx, col_ptr=col_ptr, col_idx=col_idx)


def _united(
    lists: Sequence[tuple[Tensor | None, Tensor | None, Tensor]], into: Tensor, num_rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """CSR of the unions; nothing if there are no lists."""
    named = [(ptr, idx, rows) for ptr, idx, rows in lists if ptr is not None and idx is not None]
    if not named:
        return None, None
    width = max((int(idx.max()) + 1 for _, idx, _ in named if len(idx)), default=0)
    mask = torch.zeros(num_rows, width, dtype=torch.bool)
    for ptr, idx, rows in named:
        mask |= _gathered(mask_of(ptr, idx, len(ptr) - 1, width), rows, into, num_rows)
    return csr(mask)


def _gathered(mask: Tensor, rows: Tensor, into: Tensor, num_rows: int) -> Tensor:
    """bool [num_rows, n]: row into[i] has what rows[i] of the mask has."""
    counts = torch.zeros(num_rows, mask.shape[1], dtype=torch.int32)
    return counts.index_add_(0, into, mask[rows].int()) > 0


def _wider(band: Tensor, least: Tensor) -> Tensor:
    """Bands of at least these sizes; dense stays dense."""
    return torch.where(band[:, 1:] == DENSE, band, torch.maximum(band, least))
