"""Attention on PyTorch: row tiles over gathered blocks.

A tile's rows lie at fixed places of a fixed shape, its keys come in parts whose bounds follow from the tile's ordinals
(never from the chunk, the batch or the number of threads), and parts are merged as a tree in ascending order. So a
row's bits are its own. Work inside a part is PyTorch's CPU flash attention, which hands out the log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.kernels.contract import SPLIT, AttnCall
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.torch.gather import Tile, entries, pack, tile_span, tiles, unpack
from firstlight.kernels.torch.ops import capped, linear
from firstlight.kernels.torch.probe import add_probe_sums
from firstlight.kernels.torch.skipping import kept_entries
from firstlight.kernels.torch.visibility import visible_mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ROWS = 8
"""A call's rows are a multiple of this."""
_LOWEST, _LEAST = -1e30, 1e-30
"""Stand in for -inf and 0 where nothing is visible, so that no NaN arises; a visible row is far from both."""

Parts = list[tuple[Tensor, Tensor]]
"""Partial results (out f32 [.., D], lse f32 [..]) in ascending order of their entries."""


def attend(call: AttnCall, r0: int, r1: int) -> None:
    """Attention of rows [r0, r1): writes out, lse, probe sums and stats of the call."""
    if call.layout.is_int8:
        call = replace(call, q=call.layout.seen(call.q))
    decode: list[Tile] = []
    before: dict[int, tuple[Tensor, Tensor]] = {}
    for tile in tiles(call, r0, r1):
        if tile.is_plain and tile.size == 1:
            decode.append(tile)
            continue
        if tile.is_plain and tile.b not in before:
            before[tile.b] = _blocks_before(tile, r1)
        parts = _plain_parts(tile, before[tile.b]) if tile.is_plain else _masked_parts(tile)
        out, lse = merge(parts)
        _store(tile, unpack(tile, out), unpack(tile, lse))
    if decode:
        _attend_decode(call, decode)


def attend_cuts(call: AttnCall, r0: int, r1: int) -> list[int]:
    """Where rows [r0, r1) can be sliced: the end row of each tile."""
    return [tile.hi for tile in tiles(call, r0, r1)]


# --- plain prefill tiles: all entries before the tile at once, the tile's own under the causal triangle ---------------


def _blocks_before(tile: Tile, r1: int) -> tuple[Tensor, Tensor]:
    """k, v [Hkv, n, D] of all entries before the last tile that this request has in the slice: read once."""
    last = min(tile.call.rows.row_ptr[tile.b + 1], r1) - 1
    start, _ = tile_span(int(tile.call.rows.tok[last]))
    return tile.call.layout.read_blocks(tile.view.table[:, : -(-start // BLOCK)])


def _plain_parts(tile: Tile, before: tuple[Tensor, Tensor]) -> Parts:
    q, parts = pack(tile), []
    if tile.start:
        k, v = (t[:, : tile.start] for t in before)
        parts.append(_part(q, k, v, None, tile.call))
    k, v = entries(tile, tile.start, tile.start + tile.size, _ordinals_upto(tile))
    mask = _triangle(tile.size, q.shape[2] // tile.size, q.dtype)
    return [*parts, _part(q, k, v, mask, tile.call)]


def _ordinals_upto(tile: Tile) -> Tensor | None:
    """bool [1, size]: the tile's ordinals up to its last row's; None = all, the usual case."""
    last = int(tile.place[-1])
    return None if last == tile.size - 1 else (torch.arange(tile.size) <= last)[None]


@cache
def _triangle(size: int, group: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [1, 1, size * group, size] of a tile on itself."""
    ahead = torch.arange(size)[None] > torch.arange(size)[:, None]
    mask = torch.zeros(size, size, dtype=dtype).masked_fill_(ahead, -math.inf)
    return mask.repeat_interleave(group, 0)[None, None]


# --- plain decode rows: all splits of all rows in one call ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What stays the same from layer to layer for some decode rows: P splits in all, row by row."""

    places: list[Tensor]
    """Row by row i64 [Hkv * blocks]: its splits' blocks in the flat table, part by part, head by head."""
    query: Tensor
    """i64 [P]: the row of the call that reads each split."""
    mask: Tensor
    """Additive [P * Hkv, 1, 1, SPLIT]."""
    where: tuple[Tensor, Tensor]
    """(part, row) of each split as indices."""
    depth: int
    """Splits of the longest row."""
    lo: slice | Tensor
    """The rows of the call."""
    pairs: int
    """(key, query head) pairs read."""


def _attend_decode(call: AttnCall, rows: list[Tile]) -> None:
    key = ("decode", rows[0].lo, rows[-1].hi, len(rows), rows[0].view.table.shape)
    shape = call.rows.memo.get(key)
    if shape is None:
        shape = call.rows.memo[key] = _decode_rows(call, rows)
    tables = [tile.view.table.reshape(-1).index_select(0, p) for tile, p in zip(rows, shape.places)]
    k, v = call.layout.read_blocks(torch.cat(tables).view(-1, SPLIT // BLOCK))
    q = call.q.index_select(0, shape.query).view(len(k), 1, -1, call.q.shape[2])
    out, lse = (t.reshape(len(shape.query), -1, *t.shape[2:]) for t in _part(q, k, v, shape.mask, call))
    if shape.depth > 1:
        out, lse = _merge(*_by_part(out, lse, shape, len(rows)))
    call.out[shape.lo] = out.to(call.out.dtype)
    if call.lse is not None:
        call.lse[shape.lo] = lse
    call.stats.dense += shape.pairs
    call.stats.visible += shape.pairs
    if call.probe is not None:
        for i, tile in enumerate(rows):
            add_probe_sums(tile, lse[i : i + 1])


def _decode_rows(call: AttnCall, rows: list[Tile]) -> DecodeRows:
    counts = [tile.start // SPLIT + 1 for tile in rows]
    row = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    part = torch.tensor([p for count in counts for p in range(count)])
    seen = torch.tensor([tile.start + 1 for tile in rows])[row] - part * SPLIT
    hidden = (torch.arange(SPLIT) >= seen[:, None]).repeat_interleave(rows[0].view.table.shape[0], 0)
    mask = torch.zeros(hidden.shape, dtype=call.q.dtype).masked_fill_(hidden, -math.inf)[:, None, None]
    lo = torch.tensor([tile.lo for tile in rows])
    first, last = rows[0].lo, rows[-1].lo
    return DecodeRows(
        places=[_places(tile, count) for tile, count in zip(rows, counts)],
        query=lo[row],
        mask=mask,
        where=(part, row),
        depth=max(counts),
        lo=slice(first, last + 1) if last - first == len(rows) - 1 else lo,
        pairs=sum(tile.start + 1 for tile in rows) * call.q.shape[1],
    )


def _places(tile: Tile, parts: int) -> Tensor:
    """Where in the flat table [Hkv, width] the blocks of a row's splits lie; past its own block that one stands again.

    What is read twice is masked, what lies past the row is not read.
    """
    hkv, width = tile.view.table.shape
    block = torch.arange(parts * (SPLIT // BLOCK)).clamp_(max=tile.start // BLOCK).view(parts, 1, -1)
    return (block + torch.arange(hkv)[:, None] * width).reshape(-1)


def _by_part(out: Tensor, lse: Tensor, shape: DecodeRows, num_rows: int) -> tuple[Tensor, Tensor]:
    """Splits in a row -> [depth, rows, ..], empty where a row has fewer."""
    if shape.depth * num_rows == len(shape.query):
        return (t.view(num_rows, shape.depth, *t.shape[1:]).transpose(0, 1) for t in (out, lse))  # type: ignore[return-value]
    parts = torch.zeros(shape.depth, num_rows, *out.shape[1:])
    parts_lse = torch.full((shape.depth, num_rows, *lse.shape[1:]), -math.inf)
    parts[shape.where], parts_lse[shape.where] = out, lse
    return parts, parts_lse


# --- everything else: splits of the view under a mask -----------------------------------------------------------------


def _masked_parts(tile: Tile) -> Parts:
    """One part per split of the view. A split that no row sees keeps its place, so that the tree stays the same."""
    q, parts, call = pack(tile), [], tile.call
    hkv, group = q.shape[0], q.shape[2] // tile.size
    nothing = (torch.zeros(q.shape).squeeze(1), torch.full(q.shape[:3], -math.inf).squeeze(1))
    keep = kept_entries(tile, q) if call.plan is not None and call.plan.skips else None
    for a in range(0, max(tile.view.length), SPLIT):
        see = visible_mask(tile, a, a + SPLIT)
        see = see if keep is None else see & keep[..., a : a + SPLIT]
        call.stats.visible += int(see.sum()) * (hkv // see.shape[0]) * (group // see.shape[2])
        if not see.any():
            parts.append(nothing)
            continue
        k, v = entries(tile, a, a + SPLIT, see.flatten(1, 2).any(1))
        placed = torch.zeros(see.shape[0], tile.size, group, SPLIT, dtype=torch.bool)
        placed[:, tile.place] = see.expand(-1, -1, group, -1)
        hidden = ~placed.view(-1, 1, tile.size * group, SPLIT)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -math.inf)
        out, lse = _part(q, k, v, mask.expand(hkv, -1, -1, -1), call)
        # Rows that see nothing here: the operator says lse 0, the truth is -inf.
        parts.append((out, lse.masked_fill(hidden.all(-1).squeeze(1), -math.inf)))
    return parts or [nothing]


# --- shared -----------------------------------------------------------------------------------------------------------


def _part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttnCall) -> tuple[Tensor, Tensor]:
    """q [H, 1, R, D], k, v [H, n, D], additive mask [.., 1 or R, n] -> out f32 [H, R, D], lse f32 [H, R]."""
    if call.score_cap is None:
        return _flash_part(q, k, v, mask, call.scale)
    heads = [linear(x.float(), y.float().contiguous()) for x, y in zip(q.squeeze(1), k)]
    score = capped(torch.stack(heads) * call.scale, call.score_cap)
    score = score if mask is None else score + mask.float().squeeze(1)
    lse = score.logsumexp(-1)
    weight = torch.exp(score - lse[..., None]).nan_to_num_(0.0)
    outs = [linear(w, y.float().T.contiguous()) for w, y in zip(weight, v)]
    return torch.stack(outs), lse


def _flash_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [H, 1, R, D], k, v [H, n, D], mask [.., 1 or R, n] -> out f32 [H, R, D], lse f32 [H, R].

    Odd row counts are padded: they shift the operator's scratch of each thread off its alignment, and float32 products
    change bits with that.
    """
    rows = q.shape[2]
    if extra := -rows % _ROWS:
        q = F.pad(q, (0, 0, 0, extra))
        mask = mask if mask is None or mask.shape[2] == 1 else F.pad(mask, (0, 0, 0, extra))
    out, lse = _flash(q, k[:, None], v[:, None], 0.0, False, attn_mask=mask, scale=scale)
    return out.squeeze(1)[:, :rows].float(), lse.squeeze(1)[:, :rows]


def merge(parts: Parts) -> tuple[Tensor, Tensor]:
    """Join partial results by their log-sum-exp."""
    if len(parts) == 1:
        return parts[0]
    return _merge(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))


def _merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out [P, .., D], lse [P, ..] -> [.., D], [..]. Where all parts are empty: 0 and -inf."""
    top = lse.amax(0).clamp_(min=_LOWEST)
    weight = torch.exp(lse - top)
    total = _tree(weight)
    joined = _tree(out * weight[..., None])
    return joined.div_(total.clamp(min=_LEAST)[..., None]), torch.log(total).add_(top)


def _tree(terms: Tensor) -> Tensor:
    """Sum over the first axis in pairs: zeros at the end, however many, change no bit."""
    while terms.shape[0] > 1:
        if terms.shape[0] % 2:
            terms = torch.cat([terms, torch.zeros_like(terms[:1])])
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def _store(tile: Tile, out: Tensor, lse: Tensor) -> None:
    """Rows of a tile into the call: out [n, Hq, D], lse [n, Hq]; then what needs the final log-sum-exp."""
    call = tile.call
    call.out[tile.lo : tile.hi] = out
    if call.lse is not None:
        call.lse[tile.lo : tile.hi] = lse
    pairs = int((tile.tok + 1).sum()) * call.q.shape[1]
    call.stats.dense += pairs
    call.stats.visible += pairs if tile.is_plain else 0
    if call.probe is not None:
        add_probe_sums(tile, lse)
