"""The tasks of `firstlight eval` by name: what is run for each, and how scores are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from firstlight.core.errors import UserError
from firstlight.engine.engine import Engine
from firstlight.evaluate import needle, reading, scores
from firstlight.evaluate.reference import References
from firstlight.prompt.tokenizer import Tokenizer

READING = "reading"


@dataclass(frozen=True)
class Task:
    """A task: the experiment whose records it needs (two tasks may share one), its scores, its usual size."""

    experiment: str
    scores: scores.Scores
    samples: int


TASKS = {
    "agreement": Task(READING, scores.agreement, 3),
    "perplexity": Task(READING, scores.perplexity, 3),
    **{name: Task(name, scores.retrieval, 10) for name in needle.KINDS},
}


@dataclass(frozen=True)
class Cell:
    """One run: sample number `index` of an experiment at a length."""

    experiment: str
    length: int
    index: int


def tasks_of(names: Sequence[str]) -> dict[str, Task]:
    """The tasks of these names. Raises UserError that lists the choices."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"no task is called {name!r}; choose one of: {', '.join(TASKS)}")
    return {name: TASKS[name] for name in names}


def num_tokens(cell: Cell) -> int:
    """Tokens of context that a cell takes, generated ones included."""
    return cell.length + (reading.CONTINUATION + 1 if cell.experiment == READING else 0)


def prepare(tokenizer: Tokenizer, cell: Cell, seed: int) -> Any:
    """What the cell is run on: an excerpt, or a sample of a retrieval task."""
    if cell.experiment == READING:
        return reading.excerpt(tokenizer, cell.length, cell.index)
    return needle.sample(tokenizer, cell.experiment, cell.length, cell.index, seed)


def run_cell(engine: Engine, tokenizer: Tokenizer, prepared: Any, references: References) -> dict[str, Any]:
    """The record of a cell. An excerpt's reference has to be there."""
    if not isinstance(prepared, reading.Excerpt):
        return needle.measure(engine, tokenizer, prepared)
    reference = references.find(prepared)
    assert reference is not None, "references are made before they are used"
    probe_rows = max((part.capability.last_rows for part in engine.parts), default=0)
    return reading.compare(engine, prepared, reference, probe_rows)
