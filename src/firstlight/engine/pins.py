"""Pins: the blocks that prefilled documents hold, for as long as somebody can still ask about them.

Beside the requests on the path of a prompt: a question's admission finds its document's cells through `Request.known`.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque

import numpy as np

from firstlight.cache.pool import Ids, Pool
from firstlight.core.errors import UserError
from firstlight.core.request import Known


class Pins:
    """`add`, `sweep` and `clear` belong to the thread that runs the engine, the rest to any.

    A pin is shared by its document and the requests that ask about it; the last to release it lets its blocks go, at
    the next `sweep`. A document that was lost without a word is released by the garbage collector.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.RLock()  # the garbage collector may come by in the middle of anything
        self._numbers = itertools.count()
        self._tables: dict[int, Ids] = {}
        self._users: dict[int, int] = {}
        self._dropped: deque[Ids] = deque()
        self._counted: tuple[tuple[int, ...], int] = ((), 0)

    @property
    def num_blocks(self) -> int:
        """Blocks under a pin, those of several documents counted once."""
        with self._lock:
            if (numbers := tuple(self._tables)) != self._counted[0]:
                ids = np.concatenate([*self._tables.values(), np.zeros(0, np.int32)])
                self._counted = numbers, len(np.unique(ids))
            return self._counted[1]

    def add(self, table: Ids, num_tokens: int) -> Known:
        """Hold the blocks of a table i32 [L, Hkv, columns], for one user."""
        ids, number = table[table > 0], next(self._numbers)
        self._pool.hold(ids)
        known = Known(number, table, num_tokens)
        with self._lock:
            self._tables[number], self._users[number] = ids, 1
        weakref.finalize(known, self._drop, number).atexit = False
        return known

    def retain(self, known: Known) -> None:
        """One user more. Raises UserError if there is none any more."""
        with self._lock:
            if known.number not in self._users:
                raise UserError("this document was closed; prefill or load it again")
            self._users[known.number] += 1

    def release(self, known: Known) -> None:
        """One user fewer."""
        with self._lock:
            left = self._users.get(known.number, 0) - 1
            if left > 0:
                self._users[known.number] = left
            else:
                self._drop(known.number)

    def sweep(self) -> bool:
        """Give back what nobody can ask about; whether there was anything."""
        swept = bool(self._dropped)
        while self._dropped:
            self._pool.release(self._dropped.popleft())
        return swept

    def clear(self) -> None:
        """Give everything back."""
        for number in list(self._tables):
            self._drop(number)
        self.sweep()

    def _drop(self, number: int) -> None:
        with self._lock:
            self._users.pop(number, None)
            if (ids := self._tables.pop(number, None)) is not None:
                self._dropped.append(ids)
