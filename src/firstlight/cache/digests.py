"""Digests: small summaries of KV blocks, made once a block and kept as long as its keys are what they were.

A planner names those it reads (`Capability.digests`). They belong to the pool's blocks, not to requests: a cached
prefix brings them along, and chunk after chunk finds those of the chunks before (README-attention, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.cache.pool import Ids, Pool
from firstlight.kernels.kv_layout import BLOCK

_AT_ONCE = 64
"""Blocks whose keys are read out together: fresh memory costs more than what is done in it."""


def _mean_k(keys: Tensor, count: Tensor) -> Tensor:
    """f32 [n, D]: the mean of the entries that are there."""
    sums = keys.float().sum(1)
    partial = (count < BLOCK).nonzero()[:, 0]
    sums[partial] = _masked(keys[partial], count[partial]).sum(1)
    return sums / count[:, None]


def _unit_k(keys: Tensor, count: Tensor) -> Tensor:
    """f32 [n, 64]: 1 / |k| of each entry; 0 for a key of zeros."""
    norm = keys.float().norm(dim=-1)
    return torch.where(norm > 0, 1 / norm.clamp_min(1e-30), 0.0)


def _masked(keys: Tensor, count: Tensor) -> Tensor:
    return keys.float() * (torch.arange(BLOCK) < count[:, None])[:, :, None]


DIGESTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean_k": _mean_k, "unit_k": _unit_k}
"""name -> of keys [n, 64, D], of which the first count[n] entries of each block are there."""


def digest_of(name: str, keys: Tensor) -> Tensor:
    """[Hkv, nb, ...]: a summary of each block of keys [Hkv, n, D] that lie in no pool."""
    heads, length, dim = keys.shape
    num = -(-length // BLOCK)
    blocks = pad(keys, (0, 0, 0, num * BLOCK - length)).reshape(heads * num, BLOCK, dim)
    count = torch.full((heads, num), BLOCK)
    count[:, -1] = length - (num - 1) * BLOCK
    made = DIGESTS[name](blocks, count.flatten())
    return made.view(heads, num, *made.shape[1:])


class Digests:
    """Summaries of the pool's blocks by name, each made when it is first asked for."""

    def __init__(self, pool: Pool, names: Iterable[str]) -> None:
        self._layout = pool.layout
        self._made: dict[str, Tensor] = {}
        self._count = {name: np.zeros(pool.total + 1, np.int8) for name in names}
        """Entries of each block that its summary holds; 0 = there is none."""
        pool.changed = self.forget

    def forget(self, blocks: Ids) -> None:
        """Keys of these blocks are others than they were."""
        for count in self._count.values():
            count[blocks] = 0

    def read(self, name: str, table: Tensor, length: int) -> Tensor:
        """[Hkv, nb, ...] of the first `length` entries of each row of a block table i32 [Hkv, blocks]."""
        num = -(-length // BLOCK)
        blocks = table[:, :num].numpy()
        want = np.full(num, BLOCK, np.int8)
        want[-1:] = length - (num - 1) * BLOCK
        want = np.where(blocks > 0, want, 0)
        have = self._count[name]
        if len(stale := np.flatnonzero((have[blocks] != want) & (blocks > 0))):
            self._make(name, blocks.ravel()[stale], want.ravel()[stale])
        return self._made[name][torch.from_numpy(blocks.astype(np.int64))]

    def _make(self, name: str, blocks: Ids, count: Ids) -> None:
        have = self._count[name]
        for some in np.split(np.arange(len(blocks)), range(_AT_ONCE, len(blocks), _AT_ONCE)):
            where = torch.from_numpy(blocks[some].astype(np.int64))
            keys = self._layout.read_keys(where[None])[0].view(len(some), BLOCK, -1)
            made = DIGESTS[name](keys, torch.from_numpy(count[some].astype(np.int64)))
            if name not in self._made:  # zeros take memory only where they are written
                self._made[name] = torch.from_numpy(np.zeros((len(have), *made.shape[1:]), np.float32))
            self._made[name][where] = made
        have[blocks] = count

    @property
    def nbytes(self) -> int:
        """Bytes of the summaries that there are."""
        return sum(int((self._count[n] > 0).sum()) * m[0].numel() * m.element_size() for n, m in self._made.items())
