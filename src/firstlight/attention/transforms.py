"""Plan to plan: what lets planners of different grain and scope work together (README-attention, section 2).

Planners say which keys rows see and never how a kernel packs them. Everything here keeps the visible set of every head.
"""

from __future__ import annotations

import math
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from firstlight.core.attn import DENSE, AttnPlan

_Csr = tuple[Tensor, Tensor]


def by_head(heads: Tensor, chosen: AttnPlan | None, rest: AttnPlan | None) -> AttnPlan | None:
    """One request's plan in which the query heads of bool `heads` [Hq] follow `chosen`, all others `rest`."""
    if chosen is None and rest is None:
        return None
    some = chosen or rest
    assert some is not None
    first, other = (dense_like(some, len(heads)) if plan is None else plan for plan in (chosen, rest))
    first, other = aligned(first, other)
    slots, tile_map = torch.unique(torch.stack([first.tile_map, other.tile_map]), dim=1, return_inverse=True)
    list_of = torch.where(heads, first.head_map, other.head_map + first.num_lists)
    lists, head_map = torch.unique(list_of, return_inverse=True)
    return AttnPlan(
        q_tile=first.q_tile,
        blk=first.blk,
        head_map=head_map.to(torch.int16),
        tile_base=first.tile_base,
        tile_first=first.tile_first,
        tile_map=tile_map.to(torch.int32),
        **_side_by_side(first, other, slots, lists.long()),
        **_thresholds(heads, first, other),
    )


def dense_like(plan: AttnPlan, num_heads: int) -> AttnPlan:
    """Everything visible, on the tiles of another plan."""
    return AttnPlan(
        q_tile=plan.q_tile,
        blk=plan.blk,
        head_map=torch.zeros(num_heads, dtype=torch.int16),
        tile_base=plan.tile_base,
        tile_first=plan.tile_first,
        tile_map=torch.zeros_like(plan.tile_map),
        band=torch.tensor([[0, DENSE]], dtype=torch.int32),
    )


def retile(plan: AttnPlan, q_tile: int) -> AttnPlan:
    """The same on smaller tiles, of which `plan.q_tile` is a multiple. For plans of one request.

    A pass may begin or end inside a large tile; the small ones that it lacks there are planned too, which is harmless.
    """
    times = plan.q_tile // q_tile
    assert plan.q_tile == times * q_tile and len(plan.tile_first) == 1
    if times == 1:
        return plan
    tiles = len(plan.tile_map) * times
    return replace(
        plan,
        q_tile=q_tile,
        tile_base=torch.tensor([0, tiles], dtype=torch.int32),
        tile_first=plan.tile_first * times,
        tile_map=plan.tile_map.repeat_interleave(times),
    )


def reblock(plan: AttnPlan, blk: int) -> AttnPlan:
    """The same in smaller blocks, of which `plan.blk` is a multiple."""
    times = plan.blk // blk
    assert plan.blk == times * blk
    if times == 1 or plan.blk_ptr is None or plan.blk_idx is None:
        return replace(plan, blk=blk)
    parts = plan.blk_idx[:, None] * times + torch.arange(times, dtype=torch.int32)
    return replace(plan, blk=blk, blk_ptr=plan.blk_ptr * times, blk_idx=parts.flatten())


def aligned(first: AttnPlan, other: AttnPlan) -> tuple[AttnPlan, AttnPlan]:
    """Both on common tiles and blocks, with only the tiles that both have: coarse ones may begin earlier, end later."""
    q_tile, blk = gcd(first.q_tile, other.q_tile), gcd(first.blk, other.blk)
    first, other = (reblock(retile(plan, q_tile), blk) for plan in (first, other))
    begins = [int(plan.tile_first) for plan in (first, other)]
    begin, end = max(begins), min(b + len(p.tile_map) for b, p in zip(begins, (first, other)))
    base, start = torch.tensor([0, end - begin], dtype=torch.int32), torch.tensor([begin], dtype=torch.int32)
    made = [
        replace(p, tile_base=base, tile_first=start, tile_map=p.tile_map[begin - b : end - b])
        for b, p in zip(begins, (first, other))
    ]
    return made[0], made[1]


def _side_by_side(first: AttnPlan, other: AttnPlan, slots: Tensor, lists: Tensor) -> dict[str, Any]:
    """Band and lists of slots that hold slot slots[0, s] of one plan, then slot slots[1, s] of the other."""
    plans = (first, other)
    rows = [chosen.long()[:, None] * p.num_lists + torch.arange(p.num_lists) for p, chosen in zip(plans, slots)]
    joined: dict[str, Any] = {"band": torch.cat([p.band[r] for p, r in zip(plans, rows)], 1)[:, lists].reshape(-1, 2)}
    numbers = [torch.arange(r.numel()).view(r.shape) + base for r, base in zip(rows, (0, rows[0].numel()))]
    order = torch.cat(numbers, 1)[:, lists].flatten()
    for name in ("blk", "col"):
        given = [(getattr(p, f"{name}_ptr"), getattr(p, f"{name}_idx")) for p in plans]
        if any(ptr is not None for ptr, _ in given):
            taken = [_taken(csr, r.flatten()) for csr, r in zip(given, rows)]
            joined[f"{name}_ptr"], joined[f"{name}_idx"] = _picked(_stacked(*taken), order)
    return joined


def _thresholds(heads: Tensor, chosen: AttnPlan, rest: AttnPlan) -> dict[str, Any]:
    """`skip_log` and `scan` of heads that follow one plan or the other; two that skip must scan alike."""
    skipping = [plan for plan in (chosen, rest) if plan.skip_log is not None]
    if not skipping:
        return {}
    assert len({plan.scan for plan in skipping}) == 1
    never = torch.full((1, len(heads)), -math.inf)
    first, other = (never if plan.skip_log is None else plan.skip_log for plan in (chosen, rest))
    return {"skip_log": torch.where(heads, first, other), "scan": skipping[0].scan}


def _taken(csr: tuple[Tensor | None, Tensor | None], rows: Tensor) -> _Csr:
    """Some rows of a plan's lists; empty ones where it has none."""
    ptr, idx = csr
    if ptr is None or idx is None:
        return torch.zeros(len(rows) + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    return _picked((ptr, idx), rows)


def _stacked(a: _Csr, b: _Csr) -> _Csr:
    """The rows of one, then those of the other."""
    return torch.cat([a[0], b[0][1:] + a[0][-1]]), torch.cat([a[1], b[1]])


def _picked(csr: _Csr, rows: Tensor) -> _Csr:
    """CSR rows in another order, some of them several times or never."""
    ptr, idx = csr
    begin, count = ptr[rows].long(), (ptr[rows + 1] - ptr[rows]).long()
    new = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    source = torch.arange(int(new[-1])) + (begin - new[:-1]).repeat_interleave(count)
    return new.to(torch.int32), idx[source]
