"""One request's K/V: a block table row for each (layer, KV head), written by ordinal, read as views.

As long as nothing was dropped a row is an identity: entry number = ordinal. A row that skips an ordinal becomes
explicit: it stores the ordinal and position of each entry, sorted, and its blocks are its own. A row with a window (of
a window layer, of a streaming head) is an identity of which blocks are gone: entries are numbered as if they were
there, the table says 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstlight.cache.merging import merge_entries
from firstlight.cache.pool import Ids, Pool
from firstlight.cache.windows import Windows
from firstlight.kernels.contract import KVView
from firstlight.kernels.kv_layout import BLOCK


def blocks_for(entries: NDArray[Any] | int) -> Any:
    """Blocks that hold so many entries."""
    return -(-entries // BLOCK)


class Places(NamedTuple):
    """Where entries go."""

    slots: Tensor
    """i64 [layers, n, Hkv]."""
    ends: NDArray[np.int64]
    """[layers, Hkv]: entries that rows hold with them."""

    def part(self, first: int, count: int) -> Places:
        """Of some of the layers."""
        return Places(self.slots[first : first + count], self.ends[first : first + count])


class RequestKV:
    """The table [L, Hkv, max_blocks] of one request over the pool."""

    def __init__(self, pool: Pool, num_layers: int, num_kv_heads: int, windows: Windows | None = None) -> None:
        self.pool, self.windows = pool, windows
        self.table = np.zeros((num_layers, num_kv_heads, 0), np.int32)
        self.num_blocks = np.zeros((num_layers, num_kv_heads), np.int64)
        """Blocks up to each row's end, those that are gone included."""
        self._behind = np.zeros(num_layers, np.int64)
        """Blocks below this number are behind the window of the layer's rows that have one."""
        self._gone = np.zeros((num_layers, num_kv_heads), np.int64)
        """How many of them are gone; the others stay for the sink, or for the prefix cache."""
        self.length = np.zeros((num_layers, num_kv_heads), np.int64)
        self.reserved = 0
        """Blocks of the pool's reservation that are this request's."""
        self.peak_nbytes = 0
        """The most that it ever held."""
        self._viewed: Any = None
        self._tables: tuple[Tensor, ...] = ()
        """`_viewed`, which was `table`, as tensors over the same memory, one a layer."""
        self._explicit: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> (tok, pos) i64 [Hkv, capacity] of explicit rows."""

    @property
    def nbytes(self) -> int:
        return int((self.num_blocks - self._gone).sum()) * self.pool.block_nbytes

    @property
    def is_identity(self) -> bool:
        return not self._explicit

    def is_identity_row(self, layer: int) -> bool:
        return layer not in self._explicit

    def is_common(self, layer: int) -> bool:
        """Whether all heads of an explicit layer hold the same ordinals."""
        length = self.length[layer]
        tok = self._explicit[layer][0][:, : int(length[0])]
        return bool((length == length[0]).all()) and bool((tok == tok[:1]).all())

    # --- blocks ---------------------------------------------------------------------------------------------------

    def has_place(self, ordinal: int) -> bool:
        """Whether the blocks for an ordinal are surely there, in rows that hold all below it."""
        return ordinal % BLOCK > 0 and self.windows is None and not self._explicit

    def missing(self, layers: tuple[int, int], more: int) -> int:
        """Blocks that rows of these layers lack for `more` entries each."""
        return int(self._lack(layers, more).sum())

    def provide(self, layers: tuple[int, int], more: int, written: int = 0) -> None:
        """Take the blocks that rows of these layers lack for `more` entries: whole columns while all are alike.

        `written`: entries below this one are all written before anybody reads the rows.
        Rows with a window take theirs when they are written, a layer after the other, unless it is the next token's.
        """
        lack = self._lack(layers, more)
        if self.windows is not None and more > 1:
            lack[self.windows.rows[layers[0] : layers[1]]] = 0
        self._fill(layers, lack, written)

    def leave_behind(self, layers: Iterable[int], done: int) -> None:
        """Free blocks behind layers' windows, which rows from ordinal `done` on can't read; they stay promised."""
        if self.windows is None:
            return
        first = self.windows.first(done)
        for layer in layers:
            old = int(self._behind[layer])
            if first <= old or not self.windows.layers[layer]:
                continue
            blocks = np.arange(old, first)
            blocks, heads = blocks[~self.windows.stays(blocks)], np.flatnonzero(self.windows.rows[layer])
            places = np.ix_(heads, blocks)
            freed = self.pool.release(self.table[layer][places].ravel())
            self.table[layer][places] = 0
            self._behind[layer] = first
            self._gone[layer, heads] += len(blocks)
            self.reserve(self.reserved + freed)

    def settle(self) -> None:
        """Tokens come one by one from now on: of a promise over windows only the next one's blocks stay."""
        if self.windows is not None:
            self.reserve(min(self.reserved, self.missing((0, self.table.shape[0]), 1)))

    def _fill(self, layers: tuple[int, int], lack: NDArray[np.int64], written: int = 0) -> None:
        """Take lack [layers, Hkv] blocks for the ends of rows."""
        count = int(lack.sum())
        if count == 0:
            return
        width = int((self.num_blocks[layers[0] : layers[1]] + lack).max())
        if width > self.table.shape[2]:
            grown = np.zeros((*self.table.shape[:2], width), np.int32)
            grown[:, :, : self.table.shape[2]] = self.table
            self.table = grown
        column = np.arange(self.table.shape[2])
        have = self.num_blocks[layers[0] : layers[1], :, None]
        fresh = (column >= have) & (column < have + lack[:, :, None])
        blank = np.broadcast_to((column + 1) * BLOCK > written, fresh.shape)[fresh]
        self.table[layers[0] : layers[1]][fresh] = self._take(count, blank)
        self.num_blocks[layers[0] : layers[1]] += lack
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def adopt(self, columns: Sequence[Ids], num_tokens: int) -> None:
        """Begin with shared columns [L, Hkv] each, which hold the first `num_tokens` ordinals.

        Columns behind a window have no block (0) in window layers.
        """
        assert self.table.shape[2] == 0, "only an empty table adopts"
        if columns:
            self.table = np.stack(columns, axis=2)
            self._gone[:] = (self.table == 0).sum(-1)
            self._behind[:] = self._gone.max(-1)
            self.num_blocks[:] = len(columns)
            self.length[:] = num_tokens
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def copy_column(self, source: Ids, num_tokens: int) -> None:
        """Append a copy of a column [L, Hkv] of which the first entries count: the table then holds `num_tokens`."""
        everywhere = (0, self.table.shape[0])
        self._fill(everywhere, self._lack(everywhere, num_tokens - int(self.length[0, 0])))
        target = self.table[:, :, -1]
        self.pool.layout.copy(_long(source), _long(target))
        self.length[:] = num_tokens

    def column(self, number: int) -> Ids:
        """The L x Hkv blocks of the same 64 tokens."""
        return np.ascontiguousarray(self.table[:, :, number])

    def reserve(self, blocks: int) -> None:
        """Set the promise to `blocks` (admission, or less after a cut)."""
        self.pool.reserved += blocks - self.reserved
        self.reserved = blocks

    def release(self) -> None:
        """Give everything back."""
        self.reserve(0)
        self.pool.release(self.table.ravel())
        self.table = self.table[:, :, :0]
        self.num_blocks[:] = 0
        self.length[:] = 0
        self._behind[:] = 0
        self._gone[:] = 0
        self._explicit.clear()

    # --- cells ----------------------------------------------------------------------------------------------------

    def write(self, layer: int, tok: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Upsert k, v [n, Hkv, D] by ordinal tok i64 [n] (ascending)."""
        if len(tok) == 0:
            return
        if (places := self.open(layer, tok, pos)) is not None:
            self.pool.layout.write(places.slots[0], k, v)
            self.grow((layer, layer + 1), places.ends)
            return
        if self.is_common(layer):
            self._upsert(layer, None, tok, pos, k, v)
            return
        for head in range(k.shape[1]):
            self._upsert(layer, head, tok, pos, k[:, head], v[:, head])

    def places(self, layers: tuple[int, int], tok: Tensor, pos: Tensor) -> Places | None:
        """Where ordinals tok i64 [n] go in these layers: whoever writes there says so by `grow`.

        None unless each row ends before them, or with their first, or is an identity that they continue or overwrite
        and has their blocks (of one layer, rows with a window take theirs now); `write` then sorts it out.
        """
        lo, hi = layers
        first, last, n = int(tok[0]), int(tok[-1]), len(tok)
        if self.windows is not None and hi - lo == 1 and self.windows.layers[lo]:
            self._fill(layers, self._lack(layers, last + 1 - int(self.length[lo, 0])))
        begin, listed = self.length[lo:hi].copy(), [layer for layer in self._explicit if lo <= layer < hi]
        identity = np.delete(np.arange(hi - lo), [layer - lo for layer in listed]) if listed else slice(None)
        for layer in listed:
            if ((ends := self._last(layer)) > first).any():
                return None
            begin[layer - lo] -= ends == first
            if (ends == first).any():
                self.pool.changed(self.table[layer, ends == first, begin[layer - lo][ends == first] // BLOCK])
        if len(listed) < hi - lo:
            if last - first + 1 != n or first > int(begin[identity].min()):
                return None
            if self.windows is not None and (self.num_blocks[lo:hi] * BLOCK <= last).any():
                return None
            if first < int(begin[identity].max()):
                self.pool.changed(self.table[lo:hi][identity, :, first // BLOCK : last // BLOCK + 1].ravel())
            begin[identity] = first
        assert (self.num_blocks[lo:hi] * BLOCK >= begin + n).all(), "blocks were not provided"
        alike = bool((begin == begin[0, 0]).all())
        for rows in [slice(lo, hi)] if alike else [slice(layer, layer + 1) for layer in range(lo, hi)]:
            own = begin[rows.start - lo : rows.stop - lo]
            self._own(rows, slice(None), int(own.min()) // BLOCK, (int(own.max()) + n - 1) // BLOCK + 1)
        for layer in listed:
            self._list(layer, begin[layer - lo] + np.arange(n)[:, None], tok, pos)
        if alike:  # whole columns
            first_block, place = divmod(int(begin[0, 0]), BLOCK)
            columns = self.table[lo:hi, :, first_block : (place + n - 1) // BLOCK + first_block + 1]
            starts = columns.transpose(0, 2, 1)[:, :, None].astype(np.int64) * BLOCK
            slots = (starts + np.arange(BLOCK)[:, None]).reshape(hi - lo, -1, begin.shape[1])[:, place : place + n]
        else:
            entry = begin[:, None] + np.arange(n)[:, None]
            blocks = self.table[np.arange(lo, hi)[:, None, None], np.arange(begin.shape[1]), entry // BLOCK]
            slots = blocks.astype(np.int64) * BLOCK + entry % BLOCK
        return Places(torch.from_numpy(slots), begin + n)

    def open(self, layer: int, tok: Tensor, pos: Tensor) -> Places | None:
        """`places` in one layer, which becomes explicit if its rows skip one; None if `write` must sort it out."""
        here = (layer, layer + 1)
        if (places := self.places(here, tok, pos)) is None and layer not in self._explicit:
            self._make_explicit(layer)
            places = self.places(here, tok, pos)
        return places

    def grow(self, layers: tuple[int, int], ends: NDArray[np.int64]) -> None:
        """What `places` gave for these layers was written: rows hold [layers, Hkv] entries, if not more."""
        length = self.length[slice(*layers)]
        np.maximum(length, ends, out=length)

    def beyond(self, layer: int, tok: Tensor) -> int:
        """Entries that writing ordinals tok i64 [n] adds at most to a row of the layer."""
        if not len(tok):
            return 0
        first, last, length = int(tok[0]), int(tok[-1]), int(self.length[layer, 0])
        if self.is_identity_row(layer) and last - first + 1 == len(tok) and first <= length:
            return max(last + 1 - length, 0)
        return len(tok)

    def keep(self, layer: int, idx: Sequence[Tensor]) -> None:
        """Only entries idx[h] (i64, ascending) of each head stay; blocks left over are freed.

        A head that keeps all is not touched.
        """
        if layer not in self._explicit:
            self._make_explicit(layer)
        tok, pos = self._explicit[layer]
        for head, chosen in enumerate(idx):
            if len(chosen) == self.length[layer, head]:
                continue
            places = chosen.numpy()
            k, v = self.pool.layout.lift(_long(self._slots(layer, head, places)))
            old_tok, old_pos = tok[head, chosen], pos[head, chosen]
            self._rewrite(layer, head, 0, old_tok, old_pos, k, v)
            self._trim(layer, head)
        longest = max(len(chosen) for chosen in idx)
        self._explicit[layer] = tok[:, :longest].clone(), pos[:, :longest].clone()

    def merge(self, layer: int, assign: Sequence[Tensor], mode: str) -> None:
        """Fold entries into others as `Merge` says, then only those stay."""
        kept = []
        for head, into in enumerate(assign):
            k, v = self.pool.layout.read(_long(self._slots(layer, head, np.arange(len(into)))))
            stay, k, v = merge_entries(k, v, into, mode)
            self._put(layer, head, stay.numpy(), k, v)
            kept.append(stay)
        self.keep(layer, kept)

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """k, v [Hkv, n, D] of all entries, n the longest head's; beyond a head's length they mean nothing."""
        longest = int(self.length[layer].max())
        k, v = self.pool.layout.read_blocks(torch.from_numpy(self.table[layer][:, : blocks_for(longest)]))
        return k[:, :longest], v[:, :longest]

    def view(self, layer: int, visible: Tensor | None = None) -> KVView:
        """What kernels read of one layer; `visible`: ordinals i64 [m] that this pass may read, None = all."""
        if self._viewed is not self.table:
            self._viewed, self._tables = self.table, torch.from_numpy(self.table).unbind()
        length = self.length[layer].tolist()
        tok, pos = self._explicit.get(layer, (None, None))
        mask = None if visible is None else self._among(layer, visible)
        return KVView(self._tables[layer], length, tok, pos, mask)

    def ordinals(self, layer: int) -> Tensor:
        """i64 [Hkv, max length] of each entry; beyond a head's length the values mean nothing."""
        longest = int(self.length[layer].max())
        if layer in self._explicit:
            return self._explicit[layer][0][:, :longest]
        return torch.arange(longest).expand(self.length.shape[1], longest)

    def _among(self, layer: int, chosen: Tensor) -> Tensor:
        """bool [Hkv, max length]: whose ordinals are chosen. By a table of ordinals: a search would cost a sort."""
        tok = self.ordinals(layer)
        table = torch.zeros(int(torch.maximum(tok.max(), chosen.max())) + 1, dtype=torch.bool)
        table[chosen] = True
        return table[tok]

    # --- inside ---------------------------------------------------------------------------------------------------

    def _lack(self, layers: tuple[int, int], more: int) -> NDArray[np.int64]:
        lo, hi = layers
        lack = blocks_for(self.length[lo:hi] + more) - self.num_blocks[lo:hi]
        return np.asarray(np.maximum(lack, 0))

    def _take(self, count: int, blank: NDArray[np.bool_] | None = None) -> Ids:
        """Blocks of the pool, out of what was promised as far as that goes."""
        paid = min(count, self.reserved)
        self.reserved -= paid
        self.pool.reserved -= paid
        return self.pool.take(count, blank)

    def _slots(self, layer: int, head: int | None, entry: NDArray[Any]) -> NDArray[np.int64]:
        """Slot numbers of entries: [n] of one head, [n, Hkv] of all."""
        block, place = entry // BLOCK, entry % BLOCK
        if head is None:
            return np.asarray(self.table[layer][:, block].T.astype(np.int64) * BLOCK + place[:, None])
        return np.asarray(self.table[layer, head][block].astype(np.int64) * BLOCK + place)

    def _put(self, layer: int, head: int | None, entry: NDArray[Any], k: Tensor, v: Tensor) -> None:
        """Write at entry numbers, copying shared blocks first."""
        if len(entry):
            slots = self._opened(layer, head, entry)
            shape = (*slots.shape, k.shape[-1])
            self.pool.layout.write(slots, k.reshape(shape), v.reshape(shape))

    def _opened(self, layer: int, head: int | None, entry: NDArray[Any]) -> Tensor:
        """Slots i64 [n, heads] of entries that will be written: in blocks that nobody shares."""
        heads = slice(None) if head is None else slice(head, head + 1)
        first, end = int(entry.min()) // BLOCK, int(entry.max()) // BLOCK + 1
        self._own(slice(layer, layer + 1), heads, first, end)
        self.pool.changed(self.table[layer, heads, first:end].ravel())
        return torch.from_numpy(self._slots(layer, head, entry)).view(len(entry), -1)

    def _own(self, layers: slice, heads: slice, first: int, end: int) -> None:
        """Blocks [first, end) of these rows must not be shared: copy those that are."""
        part = self.table[layers, heads, first:end]
        shared = self.pool.shared(part) & (part > 0)
        if not shared.any():
            return
        old = part[shared]
        new = self._take(len(old))
        self.pool.layout.copy(_long(old), _long(new))
        part[shared] = new
        self.pool.release(old)

    def _make_explicit(self, layer: int) -> None:
        assert self.windows is None, "rows that parts cut keep what is behind windows"
        tok = self.ordinals(layer).clone()
        self._explicit[layer] = (tok, tok.clone())

    def _last(self, layer: int) -> NDArray[np.int64]:
        """[Hkv]: the highest ordinal of each head of an explicit layer, -1 where it is empty."""
        tok, length = self._explicit[layer][0].numpy(), self.length[layer]
        ends = [int(tok[head, n - 1]) if n else -1 for head, n in enumerate(length.tolist())]
        return np.array(ends)

    def _list(self, layer: int, entry: NDArray[Any], tok: Tensor, pos: Tensor) -> None:
        """Note ordinals and positions i64 [n] of entries [n, Hkv], beyond the rows' ends until these have grown."""
        self._widen(layer, int(entry.max()) + 1)
        heads = np.arange(entry.shape[1])
        for stored, values in zip(self._explicit[layer], (tok, pos)):
            stored.numpy()[heads, entry] = values.numpy()[:, None]

    def _widen(self, layer: int, entries: int) -> None:
        """Room for the ordinals and positions of so many entries, and more when it has to grow."""
        have = self._explicit[layer][0].shape[1]
        if entries > have:
            room = max(entries, 2 * have) - have
            tok, pos = (torch.nn.functional.pad(stored, (0, room)) for stored in self._explicit[layer])
            self._explicit[layer] = tok, pos

    def _upsert(self, layer: int, head: int | None, tok: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Known ordinals are overwritten; new ones are sorted into the row's tail.

        k, v: [n, D]; or [n, Hkv, D] for head None, which means all of them, if they hold the same ordinals.
        """
        n = int(self.length[layer, head or 0])
        have = self._explicit[layer][0][head or 0, :n]
        at = torch.searchsorted(have, tok)
        known = torch.zeros(len(tok), dtype=torch.bool)
        known[at < n] = have[at[at < n]] == tok[at < n]
        self._put(layer, head, at[known].numpy(), k[known], v[known])
        new = ~known
        if bool(new.any()):
            self._insert(layer, head, int(at[new][0]), tok[new], pos[new], k[new], v[new])

    def _insert(self, layer: int, head: int | None, at: int, tok: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Merge new entries with those from entry `at` on."""
        n = int(self.length[layer, head or 0])
        old_tok, old_pos = (t[head or 0, at:n] for t in self._explicit[layer])
        slots = _long(self._slots(layer, head, np.arange(at, n)))
        k, v = self.pool.layout.pack(k, v)
        old_k, old_v = (t.view(n - at, *k.shape[1:]) for t in self.pool.layout.lift(slots))
        order = torch.argsort(torch.cat([old_tok, tok]))
        joined = (torch.cat(pair)[order] for pair in ((old_tok, tok), (old_pos, pos), (old_k, k), (old_v, v)))
        self._rewrite(layer, head, at, *joined)

    def _rewrite(self, layer: int, head: int | None, at: int, tok: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Entries from `at` on become these, as they are stored; the row ends with them."""
        end = at + len(tok)
        self._widen(layer, end)
        stored = self._explicit[layer]
        rows = slice(None) if head is None else head
        stored[0][rows, at:end], stored[1][rows, at:end] = tok, pos
        if end > at:
            self.pool.layout.lay(self._opened(layer, head, np.arange(at, end)), k, v)
        self.length[layer, rows] = end

    def _trim(self, layer: int, head: int) -> None:
        """Free the blocks behind the row's last entry."""
        needed = int(blocks_for(int(self.length[layer, head])))
        self.pool.release(self.table[layer, head, needed:])
        self.table[layer, head, needed:] = 0
        self.num_blocks[layer, head] = needed


def _long(ids: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids).astype(np.int64)).view(-1)
