"""The block pool: every single-head KV block of the engine, and who holds it.

At any moment free + used + cached = total: used blocks are held by requests, cached ones by the prefix cache alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from firstlight.kernels.kv_layout import KVLayout

Ids = NDArray[Any]


class Pool:
    """`total` blocks with numbers 1..total; number 0 is the layout's zero block and belongs to nobody."""

    def __init__(self, total: int, head_dim: int, dtype: torch.dtype, layout: type[KVLayout] = KVLayout) -> None:
        self.total = total
        self.layout = layout(total + 1, head_dim, dtype)
        self.block_nbytes = layout.block_nbytes(head_dim, dtype)
        self.reclaim: Callable[[int], None] = lambda count: None
        """Asks the prefix cache to let `count` blocks go."""
        self.changed: Callable[[Ids], None] = lambda ids: None
        """Told of blocks whose entries are no longer what they were."""
        self.reserved = 0
        """Blocks promised to admitted requests and not yet taken."""
        self._held = np.zeros(total + 1, np.int32)
        self._marked = np.zeros(total + 1, bool)
        self._touched = np.zeros(total + 1, bool)
        """Blocks that were handed out before; the others are zeros that no memory was spent on yet."""
        self._free = np.arange(total, 0, -1, dtype=np.int32)
        self._num_free = total
        self._num_cached = 0

    @property
    def free(self) -> int:
        return self._num_free

    @property
    def cached(self) -> int:
        return self._num_cached

    @property
    def used(self) -> int:
        return int(np.count_nonzero(self._held[1:]))

    @property
    def available(self) -> int:
        """What a policy may still promise: free or evictable, and not reserved."""
        return self._num_free + self._num_cached - self.reserved

    def take(self, count: int, blank: NDArray[np.bool_] | None = None) -> Ids:
        """`count` block numbers, ascending (fresh pools give runs), held once. The caller has made sure they exist.

        `blank`: those that must be zeros, all by default; of the others every place is written before anybody reads it.
        """
        if count > self._num_free:
            self.reclaim(count - self._num_free)
        assert count <= self._num_free, f"{count} blocks wanted, {self._num_free} free: an admission broke its promise"
        self._num_free -= count
        ids = np.sort(self._free[self._num_free : self._num_free + count])
        self._held[ids] = 1
        self.changed(ids)
        dirty = self._touched[ids] if blank is None else self._touched[ids] & blank
        if dirty.any():
            self.layout.clear(torch.from_numpy(ids[dirty].astype(np.int64)))
        self._touched[ids] = True
        return ids

    def hold(self, ids: Ids) -> None:
        ids = ids[ids > 0]
        self._num_cached -= int(np.count_nonzero(self._held[ids] == 0))
        self._held[ids] += 1

    def release(self, ids: Ids) -> int:
        """One request fewer holds these blocks; how many nobody holds any more."""
        ids = ids[ids > 0]
        assert (self._held[ids] > 0).all(), "a block was released twice"
        self._held[ids] -= 1
        left = ids[self._held[ids] == 0]
        self._num_cached += int(np.count_nonzero(self._marked[left]))
        self._put_back(left[~self._marked[left]])
        return len(left)

    def mark(self, ids: Ids) -> None:
        ids = ids[ids > 0]
        assert (self._held[ids] > 0).all(), "only a held block can be given to the cache"
        self._marked[ids] = True

    def unmark(self, ids: Ids) -> None:
        ids = ids[ids > 0]
        self._marked[ids] = False
        left = ids[self._held[ids] == 0]
        self._num_cached -= len(left)
        self._put_back(left)

    def num_idle(self, ids: Ids) -> int:
        return int(np.count_nonzero(self._held[ids[ids > 0]] == 0))

    def shared(self, ids: Ids) -> NDArray[np.bool_]:
        """bool, shaped as `ids`: blocks that must be copied before a write."""
        return np.asarray((self._held[ids] > 1) | self._marked[ids])

    def check(self) -> None:
        """Assert that every block is accounted for."""
        assert self.free + self.used + self.cached == self.total, (self.free, self.used, self.cached, self.total)
        assert self.reserved >= 0, self.reserved

    def poison(self) -> None:
        """Fill all free blocks with nan: whoever reads one gives himself away."""
        self._touched[self._free[: self._num_free]] = True
        free = torch.from_numpy(self._free[: self._num_free].astype(np.int64))
        self.layout.poison(free)

    def _put_back(self, ids: Ids) -> None:
        self._free[self._num_free : self._num_free + len(ids)] = ids[::-1]
        self._num_free += len(ids)
