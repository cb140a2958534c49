"""What a request keeps of table rows that are read in part only: window layers (gemma3, mistral), streaming heads.

Between the layer's attention and the next rows. Behind the window nothing is read again by this request, but for the
first tokens where a method reads those. The prefix cache may want to serve a later request from window layers, so a
margin stays there, and a whole window at places all along the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.core.parts import Streams
from firstlight.kernels.kv_layout import BLOCK

_MARGIN = 128
"""Rows that stay behind the window for a hit whose last rows are computed again (probe rows)."""
_EVERY = 4096
_EVERY_WINDOWS = 8
"""A window stays every 4,096 tokens, or every 8 windows if that is more: at most a quarter of all."""


@dataclass(frozen=True)
class Windows:
    """Table rows with a window. All windows are of one size, as in every family and method that has them."""

    size: int
    """Tokens that a row reads, its own included."""
    rows: NDArray[np.bool_]
    """[L, Hkv]: which table rows have the window; the others keep everything."""
    margin: int = 0
    """Tokens behind the window that stay."""
    every: int = 0
    """Tokens between two places that keep their window, a multiple of 64; 0 = there are none."""
    sink: int = 0
    """First tokens that stay."""

    @classmethod
    def of(cls, windows: Sequence[int | None], num_kv_heads: int, *, cached: bool) -> Windows | None:
        """From each layer's window (None = reads all); `cached`: a prefix cache will take what is left."""
        size = max((w for w in windows if w is not None), default=0)
        if size == 0:
            return None
        every = max(_EVERY, -(-_EVERY_WINDOWS * size // BLOCK) * BLOCK)
        rows = np.repeat([[w is not None] for w in windows], num_kv_heads, axis=1)
        return cls(size, rows, *((_MARGIN, every) if cached else (0, 0)))

    @classmethod
    def streaming(cls, streams: Streams) -> Windows | None:
        """From a method's streaming heads; None if there are none. No cache is served from them."""
        rows = np.array(streams.heads, bool)
        return cls(streams.recent, rows, sink=streams.sink) if rows.any() else None

    @functools.cached_property
    def layers(self) -> NDArray[np.bool_]:
        """[L]: layers with such rows."""
        return np.asarray(self.rows.any(axis=1))

    @functools.cached_property
    def first_blocks(self) -> int:
        """Blocks at the beginning that stay."""
        return -(-self.sink // BLOCK)

    def first(self, done: int) -> int:
        """The first block that rows from ordinal `done` on may read, or that the margin keeps; the sink's apart."""
        return max(0, done - self.size - self.margin + 1) // BLOCK

    def stays(self, blocks: NDArray[Any]) -> NDArray[np.bool_]:
        """Which block numbers hold part of the sink, or of a window that stays."""
        sink = np.asarray(blocks < self.first_blocks)
        if self.every == 0:
            return sink
        end = (blocks * BLOCK // self.every + 1) * self.every
        return sink | np.asarray((blocks + 1) * BLOCK > end - self.size - self.margin)

    def most(self, tokens: int) -> int:
        """Blocks that such a row holds at most between two passes over so many tokens, the next token's included."""
        span = self.size + self.margin
        kept = tokens // self.every * -(-span // BLOCK) if self.every else 0
        return min(-(-tokens // BLOCK), self.first_blocks + -(-(span - 1) // BLOCK) + 1 + kept)

    def promise(self, tokens: int, passing: int) -> int:
        """Blocks that a request holds at most at once, if a pass has at most `passing` of its tokens.

        In a pass one layer after the other holds all of them.
        """
        blocks, most, windowed = -(-tokens // BLOCK), self.most(tokens), int(self.rows.sum())
        widest, extra = int(self.rows.sum(axis=1).max()), min(blocks - most, -(-passing // BLOCK))
        return (self.rows.size - windowed) * blocks + windowed * most + widest * extra
