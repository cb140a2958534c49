"""The patterns of MInference: which shape each head's attention has, and how much of it is read (arXiv 2407.02490).

What the planner in attention/ and the search in train/ must agree on, and how a table of heads is read: ours, or one
that was published. Pure numbers, decided once before the first request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts

LINES, BLOCKS, BAND = "vertical_and_slash", "block_sparse", "stream_llm"
"""As published tables call them: columns and diagonals, clusters, first tokens with last ones (the A-shape)."""
KINDS = (LINES, BLOCKS, BAND)
LEAST = {LINES: (30, 50), BLOCKS: (2, 0), BAND: (0, 1)}
"""The numbers that they have at least: the authors' for lines, else what a row needs to read its own token."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A shape and two numbers: up to 1 they are shares of what there is, above that counts.

    LINES: columns and diagonals; BLOCKS: key blocks of a tile, and 0; BAND: first tokens and last ones.
    """

    kind: str
    first: float
    second: float = 0.0

    def counts(self, entries: int, blocks: int, budget: float = 1.0) -> tuple[int, int] | None:
        """The two numbers over so many entries or blocks, `budget` times as large; None where that is all of them."""
        total = blocks if self.kind == BLOCKS else entries
        first, second = (
            max(math.ceil(min(budget * n * (total if n <= 1 else 1), total)), least)
            for n, least in zip((self.first, self.second), LEAST[self.kind])
        )
        read = max(first, second) if self.kind == LINES else first + second
        return (first, second) if read < total else None


Table = Sequence[Mapping[int, Pattern]]
"""For each layer the query heads whose pattern is known."""


def read_table(calibration: Calibration, model: ModelFacts) -> Table:
    """The table in a calibration. Raises UserError if it isn't this model's, or holds what is no pattern."""
    layers = calibration.value("table", list)
    if len(layers) != model.num_layers or not all(isinstance(heads, dict) for heads in layers):
        raise UserError(
            f"the table {calibration.path} has {len(layers)} layers, the model has {model.num_layers}; "
            "name the file of this model"
        )
    return [{_head(h, model, calibration.path): _pattern(p, calibration.path) for h, p in x.items()} for x in layers]


def read_published(path: Path) -> Mapping[str, Any] | None:
    """Calibration values from a published table: a JSON list; None for other files."""
    try:
        body = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return {"table": body} if isinstance(body, list) else None


def _head(number: str, model: ModelFacts, path: str) -> int:
    if not number.isdecimal() or int(number) >= model.num_heads:
        raise UserError(
            f"the table {path} has a head {number}, the model has {model.num_heads} in each layer; "
            "name the file of this model"
        )
    return int(number)


def _pattern(entry: Any, path: str) -> Pattern:
    """[kind, first number, second number, anything]."""
    kind, *numbers = entry[:3] if isinstance(entry, list) and entry else (None,)
    right = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
    if kind not in KINDS or len(numbers) < 2 or not right:
        raise UserError(f"the table {path} holds {entry!r}, which is no pattern; search it again")
    return Pattern(kind, *numbers)
