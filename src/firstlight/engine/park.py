"""The park store: hidden rows that wait before a layer.

`waiting` rows are the inner corners of the staircase and rows at a barrier: they will run. `cut` rows were pruned and
may be revived. Every byte of both is counted.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Why = Literal["waiting", "cut"]


class ParkStore:
    """(request, layer, why) -> rows before that layer, by ordinal."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int, Why], tuple[Tensor, Tensor]] = {}

    def put(self, rid: str, layer: int, tok: Tensor, x: Tensor, why: Why) -> None:
        """Keep rows x [n, D] of ordinals tok i64 [n]; they join those already there, in order."""
        if len(tok) == 0:
            return
        old = self._rows.get((rid, layer, why))
        if old is not None:
            tok, x = torch.cat([old[0], tok]), torch.cat([old[1], x])
            order = torch.argsort(tok)
            tok, x = tok[order], x[order]
        self._rows[rid, layer, why] = (tok, x.clone() if old is None else x)

    def ordinals(self, rid: str, layer: int, why: Why) -> Tensor:
        """i64 [n], ascending."""
        found = self._rows.get((rid, layer, why))
        return torch.empty(0, dtype=torch.int64) if found is None else found[0]

    def take(self, rid: str, layer: int, chosen: Tensor, why: Why) -> tuple[Tensor, Tensor]:
        """Remove and return (tok, x) of those of the ordinals `chosen` that are there."""
        tok, x = self._rows.pop((rid, layer, why), (torch.empty(0, dtype=torch.int64), torch.empty(0, 0)))
        hit = torch.isin(tok, chosen)
        if not bool(hit.all()):
            self._rows[rid, layer, why] = (tok[~hit], x[~hit])
        return tok[hit], x[hit]

    def drop(self, rid: str) -> None:
        """Forget all rows of a request."""
        for key in [key for key in self._rows if key[0] == rid]:
            del self._rows[key]

    def count(self, rid: str, why: Why) -> int:
        """Rows of one request."""
        return sum(len(tok) for key, (tok, _) in self._rows.items() if key[0] == rid and key[2] == why)

    def cells(self, rid: str, num_layers: int) -> int:
        """Cells above the cut rows of one request, in a model of so many layers."""
        rows = ((key[1], len(tok)) for key, (tok, _) in self._rows.items() if key[0] == rid and key[2] == "cut")
        return sum((num_layers - layer) * count for layer, count in rows)

    @property
    def nbytes(self) -> int:
        return sum(tok.nbytes + x.nbytes for tok, x in self._rows.values())
