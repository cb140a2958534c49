"""The prefix cache: columns of 64 tokens under chains of salted hashes.

A column's key is the hash of its parent's key and its own ids, so a key names a whole prefix. The chain's root holds
the salt, the model and the recipe: K/V made under an approximate method are never found by an exact request. The last
column of a prefix may be partial; a request that shares only its beginning gets a copy of it.

A column of a model with window layers has no block (0) where a window has moved on. A hit ends only where the last
window of every such layer is held, beside every block of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.core.blocks import BlockPool

Ids = NDArray[Any]
_REMEMBERED = 4096
"""Keys of evicted columns that are remembered, to explain misses."""


@dataclass(slots=True)
class Node:
    """One cached column: `ids` are its tokens (64, fewer in a last column), `column` its blocks [L, Hkv], 0 = none."""

    key: bytes
    parent: bytes
    depth: int
    ids: Ids
    column: Ids
    is_whole: bool
    """Whether no window has moved past it."""
    last_used: int = 0
    children: dict[bytes, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """Whole columns in order, then maybe the first `partial_len` tokens of one more; why it went no further."""

    columns: tuple[Ids, ...] = ()
    partial: Ids | None = None
    num_tokens: int = 0
    reason: str = ""


class PrefixCache:
    """Hash chains over a pool: publishing marks columns, matching finds them, eviction takes the oldest leaves."""

    def __init__(self, pool: BlockPool, block: int, salt: bytes, windows: Sequence[int | None] = ()) -> None:
        """`windows`: the window of each layer; None = reads all."""
        self._pool, self._block, self._salt = pool, block, salt
        self._local = [layer for layer, window in enumerate(windows) if window is not None]
        self._nodes: dict[bytes, Node] = {}
        self._roots: dict[bytes, dict[bytes, Node]] = {}
        self._evicted: dict[bytes, None] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def root(self, *facts: str) -> bytes:
        """The key that a chain starts from: model, dtype, recipe."""
        return hashlib.sha256(self._salt + "\0".join(facts).encode()).digest()

    def held(self, root: bytes, ids: Sequence[int]) -> int:
        """Tokens at the beginning of `ids` in whole cached columns; no use of them. Any thread may ask."""
        return self._block * sum(1 for _ in self._chain(root, np.asarray(ids, np.int64)))

    def match(
        self, root: bytes, ids: Sequence[int], rows: int = 1, window: int | None = None, limit: int | None = None
    ) -> Hit:
        """The longest cached prefix of `ids` under this root, of at most `limit` tokens (None: any).

        The last `rows` tokens are computed in any case. They and what follows read `window` tokens in window layers;
        None = all.
        """
        self._clock += 1
        tokens = np.asarray(ids, np.int64)
        path = list(self._chain(root, tokens))
        at, parent = len(path) * self._block, path[-1].key if path else root
        near, shared = self._closest(parent, root, tokens[at:])
        path += [] if near is None else [near]
        for node in path:
            node.last_used = self._clock
        found = at + shared if limit is None else min(at + shared, limit)
        end, first = self._reach(path, found, len(tokens) - rows, window)
        whole, rest = divmod(end, self._block)
        columns = [self._behind(n.column) if b < first else n.column for b, n in enumerate(path[:whole])]
        why = self._why(root, parent, tokens, at, shared) if end == found else f"no window is kept at token {found}"
        return Hit(tuple(columns), path[whole].column if rest else None, end, why)

    def _reach(self, path: Sequence[Node], found: int, last: int, window: int | None) -> tuple[int, int]:
        """Where a hit on these columns can end, `found` tokens in at most, and the first column whose windows count.

        Rows from `last` on are computed anew, whatever is held.
        """
        for number in reversed(range(-(-found // self._block))):
            end = min(found, (number + 1) * self._block)
            first = 0 if window is None else max(0, min(end, last) - window + 1) // self._block
            if all(node.is_whole for node in path[first : number + 1]):
                return end, first
        return 0, 0

    def _behind(self, column: Ids) -> Ids:
        """A column without the blocks of window layers."""
        column = column.copy()
        column[self._local] = 0
        return column

    def publish(self, root: bytes, ids: Sequence[int], column: Callable[[int], Ids]) -> None:
        """Keep the columns of these tokens; `column(b)` are the blocks of column b.

        Known columns stay as they are, but for windows that had moved on and are held now.
        """
        self._clock += 1
        tokens, parent = np.asarray(ids, np.int64), root
        for number in range(-(-len(tokens) // self._block)):
            part = tokens[number * self._block : (number + 1) * self._block]
            key = self._key(parent, part)
            node = self._nodes.get(key)
            if node is None:
                if len(part) < self._block and self._closest(parent, root, part)[1] == len(part):
                    return
                node = self._add(key, parent, root, number, part, column(number))
            elif not node.is_whole:
                self._complete(node, column(number))
            node.last_used = self._clock
            parent = key

    def evict(self, blocks: int) -> None:
        """Let at least so many blocks go, least recently used prefixes first, from their ends.

        A column that no request holds may have children that one does: a request that ran beside another with the same
        beginning published its later columns below the other's. They are forgotten with it, and stay with the request.
        """
        for node in sorted(self._nodes.values(), key=lambda n: (n.last_used, -n.depth)):
            if blocks <= 0:
                return
            if node.key in self._nodes and self._pool.num_idle(node.column.ravel()):
                blocks -= self._drop(node)

    def clear(self) -> None:
        """Let everything go that no request holds."""
        self.evict(len(self._nodes) and sum(n.column.size for n in self._nodes.values()))

    def _key(self, parent: bytes, ids: Ids) -> bytes:
        return hashlib.sha256(parent + ids.tobytes()).digest()

    def _siblings(self, parent: bytes, root: bytes) -> dict[bytes, Node]:
        return self._roots.setdefault(root, {}) if parent == root else self._nodes[parent].children

    def _chain(self, root: bytes, tokens: Ids) -> Iterator[Node]:
        """The cached nodes of whole blocks, from the root on."""
        parent = root
        for at in range(0, len(tokens) - self._block + 1, self._block):
            node = self._nodes.get(self._key(parent, tokens[at : at + self._block]))
            if node is None:
                return
            yield node
            parent = node.key

    def _closest(self, parent: bytes, root: bytes, rest: Ids) -> tuple[Node | None, int]:
        """The child of `parent` that shares most tokens with the beginning of `rest`, and how many."""
        best, most = None, 0
        for node in self._siblings(parent, root).values():
            n = min(len(node.ids), len(rest))
            differs = np.flatnonzero(node.ids[:n] != rest[:n])
            shared = int(differs[0]) if len(differs) else n
            if shared > most:
                best, most = node, shared
        return best, most

    def _add(self, key: bytes, parent: bytes, root: bytes, depth: int, ids: Ids, column: Ids) -> Node:
        self._pool.mark(column.ravel())
        node = Node(key, parent, depth, ids.copy(), column, is_whole=bool((column > 0).all()))
        self._siblings(parent, root)[key] = node
        self._nodes[key] = node
        return node

    def _complete(self, node: Node, column: Ids) -> None:
        """Take the blocks that a known column lacks."""
        fresh = np.where(node.column == 0, column, 0)
        self._pool.mark(fresh.ravel())
        node.column = node.column + fresh
        node.is_whole = bool((node.column > 0).all())

    def _drop(self, node: Node) -> int:
        """Forget a node and all below it; how many blocks that frees."""
        siblings = self._nodes[node.parent].children if node.parent in self._nodes else self._roots[node.parent]
        del siblings[node.key]
        below = [node]
        for each in below:  # grows while it is read: chains are deeper than Python's stack
            below.extend(each.children.values())
        return sum(self._forget(each) for each in below)

    def _forget(self, node: Node) -> int:
        del self._nodes[node.key]
        freed = self._pool.num_idle(node.column.ravel())
        self._pool.unmark(node.column.ravel())
        self._evicted[node.key] = None
        while len(self._evicted) > _REMEMBERED:
            del self._evicted[next(iter(self._evicted))]
        return freed

    def _why(self, root: bytes, parent: bytes, tokens: Ids, at: int, shared: int) -> str:
        """One line on why the match ends where it ends; empty if all is cached."""
        if at + shared == len(tokens):
            return ""
        if self._key(parent, tokens[at : at + self._block]) in self._evicted:
            return f"evicted from token {at} on"
        if at + shared == 0:
            return (
                "no cached prompt begins like this one" if self._roots.get(root) else "nothing cached for this recipe"
            )
        return f"differs from every cached prompt at token {at + shared}"
