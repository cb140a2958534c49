"""`attend` on the compiled kernel (csrc/attention.cpp): a call's tensors become addresses; nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.core.attn import AttnPlan
from firstlight.kernels.contract import AttnCall, AttnRows, KVView, ProbeRows
from firstlight.kernels.native import lib

Numbers = NDArray[np.int64]
_PLAN_NUMBERS = 14
_STEP = 64
"""Rows between two places where a call can be sliced."""


def attend(call: AttnCall, r0: int, r1: int) -> None:
    """Attention of rows [r0, r1): writes out, lse, probe sums and stats of the call."""
    assert lib is not None
    if r0 >= r1:
        return
    q, out, layout, rows = call.q, call.out, call.layout, call.rows
    row_ptr, before, tok, pos = rows.memo.get("numbers") or _numbers(rows)
    (q_row, q_head, one), (out_row, out_head, also_one), (_, heads, dim) = q.stride(), out.stride(), q.shape
    assert one == also_one == 1 and dim % 16 == 0
    if call.numbers is None:
        plan = None if call.plan is None else plan_numbers(call.plan)
        call.numbers = view_numbers(call.kv), plan, None if call.probe is None else _probe(call.probe)
    views, plan, probe = call.numbers
    numbers = np.array(
        [
            *(q.data_ptr(), q_row, q_head, out.data_ptr(), out_row, out_head, _address(call.lse)),
            *(layout.k.data_ptr(), layout.v.data_ptr(), heads, len(call.kv[0].length), dim),
            *(len(call.kv), row_ptr.ctypes.data, tok, pos, call.model_window or 0),
        ],
        np.int64,
    )
    how = (torch.get_num_threads(), q.dtype == torch.bfloat16, layout.is_int8)
    listed = 0 if plan is None else plan.ctypes.data
    seen = lib.attend(numbers, listed, probe, views.ctypes.data, call.scale, call.score_cap or 0.0, r0, r1, *how)
    call.stats.dense += int(before[r1] - before[r0]) * heads
    call.stats.visible += seen


def view_numbers(views: Sequence[KVView]) -> Numbers:
    """[B, ..]: views as the kernel reads them: the table first, each head's length at the end."""
    return np.array([_view(view) for view in views], np.int64)


def layer_numbers(views: Sequence[KVView], steps: Sequence[int], lengths: Sequence[Numbers]) -> Numbers:
    """[L, B, ..]: `view_numbers` of L layers that differ from the first one's views in tables and lengths alone.

    Of each view the bytes from a layer's table to the next one's, and lengths [L, Hkv].
    """
    layers, heads = lengths[0].shape
    first = view_numbers(views)
    numbers = np.empty((layers, *first.shape), np.int64)
    numbers[:] = first
    for view, (step, length) in enumerate(zip(steps, lengths)):
        numbers[:, view, 0] += step * np.arange(layers)
        numbers[:, view, -heads:] = length
    return numbers


def _numbers(rows: AttnRows) -> tuple[Numbers, Numbers, int, int]:
    """Alike in all layers: row_ptr, dense pairs before each row, addresses of ordinals and positions."""
    assert rows.tok.is_contiguous() and rows.pos.is_contiguous()
    made = (np.array(rows.row_ptr, np.int64), _dense_pairs(rows), rows.tok.data_ptr(), rows.pos.data_ptr())
    rows.memo["numbers"] = made
    return made


def attend_cuts(call: AttnCall, r0: int, r1: int) -> list[int]:
    """Where rows [r0, r1) can be sliced: the end row of some rows each."""
    return [*range(r0 + _STEP, r1, _STEP), r1] if r1 > r0 else []


def _dense_pairs(rows: AttnRows) -> Numbers:
    """[N + 1]: (row, key) pairs of a dense pass over the rows before each."""
    pairs = np.zeros(len(rows.tok) + 1, np.int64)
    np.cumsum(rows.tok.numpy() + 1, out=pairs[1:])
    return pairs


def _view(view: KVView) -> list[int]:
    table, tok, visible = view.table, view.tok, view.visible
    step, one = table.stride()
    assert one == 1
    return [
        *(table.data_ptr(), step, table.shape[1]),
        *((0, 0, 0) if tok is None else (tok.data_ptr(), _address(view.pos), tok.stride(0))),
        *((0, 0) if visible is None else (visible.data_ptr(), visible.stride(0))),
        *view.length,
    ]


def plan_numbers(plan: AttnPlan | None) -> Numbers:
    """A plan as the kernel reads it, whose tensors must be kept; zeros for none."""
    if plan is None:
        return np.zeros(_PLAN_NUMBERS, np.int64)
    lists = (plan.head_map, plan.tile_base, plan.tile_first, plan.tile_map, plan.band)
    listed = (plan.blk_ptr, plan.blk_idx, plan.col_ptr, plan.col_idx)
    assert all(t is None or t.is_contiguous() for t in (*lists, *listed, plan.skip_log))
    skip = plan.skip_log if plan.skips else None
    numbers = (*map(_address, lists), *map(_address, listed), _address(skip), plan.scan)
    return np.array([plan.q_tile, plan.blk, plan.num_lists, *numbers], np.int64)


def _probe(probe: ProbeRows) -> Numbers:
    length = [0 if c is None else c.shape[1] for c in probe.colsum]
    return np.array([*probe.first_tok, *map(_address, probe.colsum), *length], np.int64)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
