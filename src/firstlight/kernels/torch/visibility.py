"""Which entries of a split a tile's rows see, as a mask that broadcasts over heads that agree."""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.core.attn import DENSE, AttnPlan
from firstlight.kernels.torch.gather import Tile


def visible_mask(rows: Tile, a: int, e: int) -> Tensor:
    """bool [H', n, G', e - a]: row sees entry; H' is 1 or Hkv, G' is 1 or G, both 1 where all heads agree."""
    call, view = rows.call, rows.view
    entry = torch.arange(a, e)
    tok, pos = _stored(view.tok, entry, a), _stored(view.pos, entry, a)
    exists = entry < torch.tensor(view.length)[:, None]
    if len(set(view.length)) == 1:
        exists = exists[:1]
    if view.visible is not None:
        exists = exists & _padded(view.visible, a, e, False)
    row_tok, row_pos = rows.tok[:, None], rows.pos[:, None]
    see = exists[:, None] & (tok[:, None] <= row_tok)
    if call.model_window is not None:
        see = see & (row_pos - pos[:, None] < call.model_window)
    see = see[:, :, None]
    return see if call.plan is None else see & _planned(call.plan, rows, entry, pos, call.q.shape[1])


def _stored(values: Tensor | None, entry: Tensor, a: int) -> Tensor:
    """[H', len(entry)] ordinals or positions of entries; identity views: the entry's number."""
    return entry[None] if values is None else _padded(values, a, a + len(entry), 0)


def _padded(values: Tensor, a: int, e: int, fill: int | bool) -> Tensor:
    """values [H, n] -> [H, e - a], filled past its end."""
    out = torch.full((values.shape[0], e - a), fill, dtype=values.dtype)
    part = values[:, a:e]
    out[:, : part.shape[1]] = part
    return out


def _planned(plan: AttnPlan, rows: Tile, entry: Tensor, pos: Tensor, num_heads: int) -> Tensor:
    """bool [H', n, G', m]: what the plan's lists let each row see, before causality."""
    b = rows.b
    tile = rows.tok // plan.q_tile - int(plan.tile_first[b])
    slot = plan.tile_map[int(plan.tile_base[b]) + tile].long()
    lists = plan.num_lists
    row = slot[:, None] * lists + torch.arange(lists)
    distance = rows.pos[:, None] - pos[:, None]
    band = plan.band[row].long()
    sink, window = band[..., 0][None, ..., None], band[..., 1][None, ..., None]
    near = (distance[:, :, None] < window) & (window > 0)  # (0, 0) is no band, whatever the positions
    see = (entry < sink) | near | (window == DENSE)
    for ptr, idx, unit in ((plan.blk_ptr, plan.blk_idx, plan.blk), (plan.col_ptr, plan.col_idx, 1)):
        if ptr is not None and idx is not None:
            see = see | _listed(ptr, idx, row, torch.div(entry, unit, rounding_mode="floor"))
    return _by_head(see, plan, num_heads, rows.call.kv[b].table.shape[0])


def _listed(ptr: Tensor, idx: Tensor, row: Tensor, unit: Tensor) -> Tensor:
    """bool [1, n, L, m]: whether unit number `unit[m]` is in CSR row `row[n, L]`."""
    used, inverse = torch.unique(row, return_inverse=True)
    hit = torch.stack([torch.isin(unit, idx[int(ptr[r]) : int(ptr[r + 1])]) for r in used.tolist()])
    return hit[inverse][None]


def _by_head(see: Tensor, plan: AttnPlan, num_heads: int, num_kv_heads: int) -> Tensor:
    """[H'', n, L, m] -> [H', n, G', m]: each query head takes its list."""
    if plan.num_lists == 1:
        return see
    group = num_heads // num_kv_heads
    lists = plan.head_map.long().view(num_kv_heads, group)
    per_head = see.expand(num_kv_heads, -1, -1, -1)
    return torch.stack([per_head[h][:, lists[h]] for h in range(num_kv_heads)])
