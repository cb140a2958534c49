"""What rows see, counted: a plan against the entries of one KV head, by kind of list and by cells of a square grid.

The kernels count what they read as well, but not by head, place or kind. Here it is worked out from the plan alone, by
the meaning that `core/attn.py` gives it; a test holds both counts to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from firstlight.attention.grid import mask_of
from firstlight.core.attn import DENSE
from firstlight.kernels.contract import AttnCall

KINDS = ("dense", "listed", "band", "columns")
"""Why a row sees a key; of several reasons the first one here counts."""
_CELLS = 96


def cell_size(tokens: int) -> int:
    """Tokens along the side of a cell, a power of two: 96 cells or fewer hold the prompt."""
    size = 1
    while -(-tokens // size) > _CELLS:
        size *= 2
    return size


@dataclass(frozen=True)
class Sight:
    """Rows [n] of a call for one request, and the query heads of one KV head (L of the plan's lists)."""

    call: AttnCall
    kv_head: int
    rows: Tensor
    """i64 [n]: numbers of the rows in the call."""

    @cached_property
    def tok(self) -> Tensor:
        """i64 [n]: the rows' ordinals."""
        return self.call.rows.tok[self.rows]

    @cached_property
    def entries(self) -> Tensor:
        """i64 [m]: ordinals of the entries."""
        view = self.call.kv[0]
        length = view.length[self.kv_head]
        return torch.arange(length) if view.tok is None else view.tok[self.kv_head, :length].contiguous()

    @cached_property
    def _there(self) -> Tensor:
        """bool [m]: entries that this pass may read at all."""
        visible = self.call.kv[0].visible
        if visible is None:
            return torch.ones(len(self.entries), dtype=torch.bool)
        return visible[self.kv_head, : len(self.entries)]

    @cached_property
    def end(self) -> Tensor:
        """i64 [n]: entries up to the row's own."""
        return torch.searchsorted(self.entries, self.tok, right=True)

    @cached_property
    def begin(self) -> Tensor:
        """i64 [n]: entries before the model's own window."""
        window = self.call.model_window
        return torch.zeros_like(self.end) if window is None else self._before(self.tok - window)

    def _before(self, pos: Tensor) -> Tensor:
        """How many entries have a position of `pos` or less."""
        view = self.call.kv[0]
        stored = self.entries if view.pos is None else view.pos[self.kv_head, : len(self.entries)].contiguous()
        return torch.searchsorted(stored, pos.contiguous(), right=True)

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """The lists that the heads follow, i64 [L] ascending, and for each of the heads the place of its own there."""
        group = self.call.q.shape[1] // len(self.call.kv[0].length)
        plan = self.call.plan
        heads = torch.zeros(group, dtype=torch.int64) if plan is None else plan.head_map.long()
        own = heads if plan is None else heads.view(-1, group)[self.kv_head]
        lists, place = torch.unique(own, return_inverse=True)
        return lists, place

    @cached_property
    def _csr_row(self) -> tuple[Tensor, Tensor]:
        """The plan's CSR rows that are followed, i64 [X], and i64 [n, L]: which of them each row follows."""
        plan = self.call.plan
        assert plan is not None
        slot = plan.tile_map.long()[self.tok // plan.q_tile - int(plan.tile_first[0])]
        used, row = torch.unique(slot[:, None] * plan.num_lists + self.lists[0], return_inverse=True)
        return used, row

    @cached_property
    def _band(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sink, first entry of the window, whether dense) of each row and list, [n, L]."""
        plan = self.call.plan
        if plan is None:
            none = torch.zeros(len(self.tok), 1, dtype=torch.int64)
            return none, none, torch.ones_like(none, dtype=torch.bool)
        used, row = self._csr_row
        sink, window = plan.band[used].long()[row].unbind(-1)
        near = torch.where(window > 0, self._before(self.tok[:, None] - window), self.end[:, None])
        return sink, near, window == DENSE

    @cached_property
    def _listed(self) -> tuple[Tensor, Tensor]:
        """bool [X, m]: entries in listed blocks, and columns outside of them."""
        plan, num = self.call.plan, len(self.entries)
        if plan is None:
            none = torch.zeros(1, num, dtype=torch.bool)
            return none, none
        used, _ = self._csr_row
        size = len(plan.band)
        blocks = mask_of(plan.blk_ptr, plan.blk_idx, size, -(-num // plan.blk))[used]
        listed = blocks.repeat_interleave(plan.blk, 1)[:, :num]
        return listed, mask_of(plan.col_ptr, plan.col_idx, size, num)[used] & ~listed

    def mask(self) -> Tensor:
        """bool [n, L, m]: who sees what."""
        sink, near, dense = (t[..., None] for t in self._band)
        entry = torch.arange(len(self.entries))
        see = dense | (entry < sink) | (entry >= near)
        if self.call.plan is not None:
            listed, columns = self._listed
            see = see | (listed | columns)[self._csr_row[1]]
        causal = (entry < self.end[:, None]) & (entry >= self.begin[:, None]) & self._there
        return see & causal[:, None]

    def counts(self, cell: int, num: int) -> Tensor:
        """i64 [kinds, num, L, num]: pairs (row, key) by the cells of `cell` ordinals that they lie in."""
        edges = torch.searchsorted(self.entries, torch.arange(num + 1) * cell)
        first = torch.maximum(edges[:-1], self.begin[:, None])[:, None]
        last = torch.minimum(edges[1:], self.end[:, None])[:, None]
        sums = torch.zeros(len(KINDS), num, len(self.lists[0]), num, dtype=torch.int64)
        for kind, pairs in self._pairs(first, last):
            sums[KINDS.index(kind)].index_add_(0, self.tok // cell, pairs.expand(-1, sums.shape[2], -1))
        return sums

    def _pairs(self, first: Tensor, last: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Of each kind that there is: entries of [first, last) [n, 1, C] that are read for it, i64 [n, L or 1, C]."""
        plan, (sink, near, dense) = self.call.plan, (t[..., None] for t in self._band)
        if bool(dense.any()):
            yield "dense", self._in(first, last) * dense
        if plan is None:
            return
        row, sparse = self._csr_row[1], ~dense
        listed, columns = (_sums(mask & self._there) for mask in self._listed)
        if plan.blk_ptr is not None:
            yield "listed", _between(listed, row, first, last) * sparse
        if bool((sink > 0).any()) or bool((near < self.end[:, None, None]).any()):
            window = torch.maximum(first, torch.maximum(near, sink))
            parts = ((first, torch.minimum(last, sink)), (window, last))
            sunk, near_by = ((self._in(a, e) - _between(listed, row, a, e)) * sparse for a, e in parts)
            yield "band", sunk + near_by
        if plan.col_ptr is not None:
            free = torch.maximum(first, sink), torch.minimum(last, near)
            yield "columns", _between(columns, row, *free) * sparse

    def _in(self, begin: Tensor, end: Tensor) -> Tensor:
        """Entries of [begin, end) that this pass may read."""
        if self.call.kv[0].visible is None:
            return (end - begin).clamp_(min=0)
        return _between(_sums(self._there[None]), torch.zeros(1, 1, dtype=torch.int64), begin, end)

    def attention(self) -> Tensor:
        """f32 [G, n, m]: softmax over all entries that the model lets the rows see, whatever the plan says."""
        call, group = self.call, len(self.lists[1])
        heads = slice(self.kv_head * group, (self.kv_head + 1) * group)
        table = call.kv[0].table[self.kv_head : self.kv_head + 1]
        keys = call.layout.read_keys(table)[0, : len(self.entries)].float()
        scores = call.q[self.rows, heads].float().transpose(0, 1) @ keys.T * call.scale
        if call.score_cap is not None:
            scores = call.score_cap * torch.tanh(scores / call.score_cap)
        entry = torch.arange(len(self.entries))
        hidden = (entry >= self.end[:, None]) | (entry < self.begin[:, None]) | ~self._there
        return scores.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)


def _sums(mask: Tensor) -> Tensor:
    """i32 [X, m + 1]: how many places of bool [X, m] are true before each."""
    return torch.nn.functional.pad(mask.cumsum(1, dtype=torch.int32), (1, 0))


def _between(sums: Tensor, row: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """i64 [n, L, C]: how many of [begin, end) [n, 1 or L, C] are there, in the rows [n, L] of `_sums`."""
    of, width = sums.flatten(), sums.shape[1]
    at = row[..., None] * width
    end = torch.maximum(begin, end)
    return (of[at + end] - of[at + begin]).long()
