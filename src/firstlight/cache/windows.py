"""What a request keeps of layers that read a window only (gemma3, mistral): how far behind it their blocks go.

Between the layer's attention and the next rows. Behind the window nothing is read again by this request; the prefix
cache may want to serve a later one from here, so a margin stays, and a whole window at places all along the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.kernels.kv_layout import BLOCK

_MARGIN = 128
"""Rows that stay behind the window for a hit whose last rows are computed again (probe rows)."""
_EVERY = 4096
_EVERY_WINDOWS = 8
"""A window stays every 4,096 tokens, or every 8 windows if that is more: at most a quarter of all."""


@dataclass(frozen=True)
class Windows:
    """The windows of a model's local layers. All are of one size, as in every family that has them."""

    size: int
    """Tokens that a row reads, its own included."""
    layers: NDArray[np.bool_]
    """[L]: which layers are local."""
    margin: int = 0
    """Rows behind the window that stay."""
    every: int = 0
    """Tokens between two places that keep their window, a multiple of 64; 0 = there are none."""

    @classmethod
    def of(cls, windows: Sequence[int | None], *, cached: bool) -> Windows | None:
        """From each layer's window (None = reads all); `cached`: a prefix cache will take what is left."""
        size = max((w for w in windows if w is not None), default=0)
        if size == 0:
            return None
        every = max(_EVERY, -(-_EVERY_WINDOWS * size // BLOCK) * BLOCK)
        keep = (_MARGIN, every) if cached else (0, 0)
        return cls(size, np.array([w is not None for w in windows]), *keep)

    def first(self, done: int) -> int:
        """The first block that rows from ordinal `done` on may read, or that the margin keeps."""
        return max(0, done - self.size - self.margin + 1) // BLOCK

    def stays(self, blocks: NDArray[Any]) -> NDArray[np.bool_]:
        """Which block numbers hold part of a window that stays."""
        if self.every == 0:
            return np.zeros(len(blocks), bool)
        end = (blocks * BLOCK // self.every + 1) * self.every
        return np.asarray((blocks + 1) * BLOCK > end - self.size - self.margin)

    def most(self, tokens: int) -> int:
        """Blocks that a local row holds at most between two passes over so many tokens, the next token's included."""
        span = self.size + self.margin
        kept = tokens // self.every * -(-span // BLOCK) if self.every else 0
        return min(-(-tokens // BLOCK), -(-(span - 1) // BLOCK) + 1 + kept)

    def promise(self, tokens: int, num_kv_heads: int) -> int:
        """Blocks that a request holds at most at once: in a pass one local layer after the other has all its tokens."""
        blocks, most, local = -(-tokens // BLOCK), self.most(tokens), int(self.layers.sum())
        return num_kv_heads * ((len(self.layers) - local) * blocks + local * most + blocks - most)
