"""Where operators' results lie: in fresh memory, or in memory that whoever drives them lends them again and again.

Lent memory keeps its place, so a call that was noted (kernels/tape.py) still finds its operands when it is made.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class _Lent(threading.local):
    """Per thread: engines in different threads don't share memory."""

    by: Memory | None = None


_lent = _Lent()


class Memory:
    """Tensors that are handed out by shape and type; after `begin` the first ones come again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Sequence[int], torch.dtype], list[Tensor]] = {}
        self._given: dict[tuple[Sequence[int], torch.dtype], int] = {}

    def begin(self) -> None:
        """What was handed out so far is no longer needed."""
        self._given.clear()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[..] with anything in it, never the same tensor twice since `begin`."""
        key = (tuple(shape), dtype)
        kept, number = self._kept.setdefault(key, []), self._given.get(key, 0)
        self._given[key] = number + 1
        if number == len(kept):
            kept.append(torch.empty(shape, dtype=dtype))
        return kept[number]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """This thread's operators put their results here meanwhile."""
        before, _lent.by = _lent.by, self
        try:
            yield
        finally:
            _lent.by = before


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for an operator's result [..], lent if somebody lends."""
    return torch.empty(shape, dtype=dtype) if _lent.by is None else _lent.by.empty(shape, dtype)
