"""The reference of `attend`: the set semantics of `core/attn.py` written out as dense masks, in float64.

It builds the whole (row, query head, entry) mask of a request and KV head, then takes one softmax. Slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firstlight.core.attn import DENSE, AttnPlan
from firstlight.kernels.contract import AttnCall, KVView
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.skipping import highest, kept


def attend(call: AttnCall, r0: int, r1: int) -> None:
    """Rows [r0, r1) of the call: writes `out` and `lse`, adds to `probe.colsum` and `stats`."""
    ptr = call.rows.row_ptr
    for b, view in enumerate(call.kv):
        lo, hi = max(r0, ptr[b]), min(r1, ptr[b + 1])
        for h in range(len(view.length)):
            if lo < hi:
                _attend_head(call, b, h, lo, hi)


def visible_mask(call: AttnCall, b: int, h: int, lo: int, hi: int) -> Tensor:
    """Which entries of KV head h of request b rows [lo, hi) see: bool [hi - lo, G, length]."""
    tok, pos = entry_numbers(call.kv[b], h)
    visible = call.kv[b].visible
    seen = tok <= call.rows.tok[lo:hi, None]
    if visible is not None:
        seen &= visible[h, : len(tok)]
    if call.model_window is not None:
        seen &= pos > call.rows.pos[lo:hi, None] - call.model_window
    group = call.q.shape[1] // len(call.kv[b].length)
    heads = range(h * group, (h + 1) * group)
    seen = seen[:, None].expand(-1, group, -1)
    return seen if call.plan is None else seen & _planned(call, call.plan, b, heads, lo, hi, pos)


def entry_numbers(view: KVView, h: int) -> tuple[Tensor, Tensor]:
    """Ordinals and positions i64 [length] of KV head h's entries."""
    n = view.length[h]
    if view.tok is None or view.pos is None:
        return torch.arange(n), torch.arange(n)
    return view.tok[h, :n], view.pos[h, :n]


def _planned(call: AttnCall, plan: AttnPlan, b: int, heads: range, lo: int, hi: int, pos: Tensor) -> Tensor:
    """What the plan alone allows: bool [hi - lo, G, length], given the entries' positions."""
    distance = call.rows.pos[lo:hi, None] - pos
    tile = call.rows.tok[lo:hi] // plan.q_tile
    slot = plan.tile_map[plan.tile_base[b] + tile - plan.tile_first[b]]
    seen = torch.zeros(hi - lo, len(heads), len(pos), dtype=torch.bool)
    for g, head in enumerate(heads):
        csr_row = slot * plan.num_lists + plan.head_map[head]
        for row in set(csr_row.tolist()):
            mine, window = csr_row == row, int(plan.band[row, 1])
            near = (distance[mine] < window) & (window > 0)
            seen[mine, g] = near | (window == DENSE) | _listed(plan, row, len(pos))
    return seen


def _listed(plan: AttnPlan, row: int, n: int) -> Tensor:
    """The entries that CSR row `row` names outside its window: bool [n]."""
    entry = torch.arange(n)
    listed = entry < plan.band[row, 0]
    if plan.blk_ptr is not None and plan.blk_idx is not None:
        listed |= torch.isin(entry // plan.blk, plan.blk_idx[plan.blk_ptr[row] : plan.blk_ptr[row + 1]])
    if plan.col_ptr is not None and plan.col_idx is not None:
        listed |= torch.isin(entry, plan.col_idx[plan.col_ptr[row] : plan.col_ptr[row + 1]])
    return listed


def scores(call: AttnCall, b: int, h: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """bool, float64 [hi - lo, G, length]: which entries rows see; their scores, scaled and capped, -inf elsewhere."""
    seen = visible_mask(call, b, h, lo, hi)
    heads = slice(h * seen.shape[1], (h + 1) * seen.shape[1])
    k = _entries(call.layout.read_keys(call.kv[b].table[h : h + 1]), seen)
    score = call.layout.seen(call.q[lo:hi, heads]).double() @ k.T * call.scale
    if call.score_cap is not None:
        score = call.score_cap * torch.tanh(score / call.score_cap)
    return seen, score.masked_fill(~seen, -torch.inf)


def _attend_head(call: AttnCall, b: int, h: int, lo: int, hi: int) -> None:
    seen, score = scores(call, b, h, lo, hi)
    heads = slice(h * seen.shape[1], (h + 1) * seen.shape[1])
    v = _entries(call.layout.read_blocks(call.kv[b].table[h : h + 1])[1], seen)
    keep = seen if call.plan is None or not call.plan.skips else seen & _kept(score, call.plan, b, heads)
    lse = score.masked_fill(~keep, -torch.inf).logsumexp(-1)
    # An empty set has lse -inf and would give nan here; its weights are all masked, so it gets 0.
    weight = torch.exp(score - lse[..., None]).masked_fill(~seen, 0)
    call.out[lo:hi, heads] = (weight.masked_fill(~keep, 0) @ v).to(call.out.dtype)
    if call.lse is not None:
        call.lse[lo:hi, heads] = lse.float()
    _add_probe(call, b, h, lo, hi, weight)
    call.stats.dense += int((call.rows.tok[lo:hi] + 1).sum()) * seen.shape[1]
    call.stats.visible += int(keep.sum())


def _kept(score: Tensor, plan: AttnPlan, b: int, heads: slice) -> Tensor:
    """Which entries lie in blocks that a row doesn't skip: bool [n, G, length], given masked scores."""
    blocks = kept(highest(score), plan, b, heads)
    return blocks.repeat_interleave(BLOCK, -1)[..., : score.shape[-1]]


def _entries(blocks: Tensor, seen: Tensor) -> Tensor:
    """K or V [1, 64 nb, D] -> float64 [length, D], with zeros for what no row sees: it may be nan."""
    return torch.where(seen.any(0).any(0)[:, None], blocks[0, : seen.shape[-1]].double(), 0)


def _add_probe(call: AttnCall, b: int, h: int, lo: int, hi: int, weight: Tensor) -> None:
    if call.probe is None:
        return
    colsum, mine = call.probe.colsum[b], call.rows.tok[lo:hi] >= call.probe.first_tok[b]
    if colsum is not None:
        colsum[h, : weight.shape[-1]] += weight[mine].sum((0, 1)).float()
