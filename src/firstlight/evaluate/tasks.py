"""The tasks of `firstlight eval` by name. A task is a small class: what is run for it, and how scores are made of that.

What is run is a cell: sample number so-and-so of an experiment at a length, under one setting. Two tasks may share an
experiment. A new task of retrieval is a line in a table of makers; another kind of task is a class here.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.registry import Part
from firstlight.engine.engine import Engine
from firstlight.evaluate import counting, hops, needle, reading, recall, retrieval, scores, tracing
from firstlight.evaluate.haystack import Draw
from firstlight.evaluate.reference import References
from firstlight.evaluate.retrieval import PLACEMENTS, Puzzle
from firstlight.prompt.tokenizer import Tokenizer

READING, RECALL = "reading", "recall"


@dataclass(frozen=True)
class Cell:
    """One run: sample number `index` of an experiment at a length."""

    experiment: str
    length: int
    index: int


@dataclass(frozen=True)
class Passage:
    """The tokens of a prompt that is only prefilled."""

    book: str
    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + 1


@dataclass(frozen=True)
class Desk:
    """What tasks work with: a setting's parts, an engine under it, and what dense left for them."""

    parts: Sequence[Part]
    tokenizer: Tokenizer
    references: References
    captures: Mapping[Passage, recall.Captured]
    engine: Engine | None = None

    @property
    def running(self) -> Engine:
        assert self.engine is not None, "the task doesn't say that it needs an engine"
        return self.engine


class Task(ABC):
    """What is run for a row of the table, and what the row says."""

    samples = 10
    """Prompts of each length, unless somebody says otherwise."""
    needs_engine = True
    by_row = False
    """Rows are compared at their places, so a prompt must not be shortened."""

    @abstractmethod
    def experiments(self, placements: Sequence[str]) -> list[str]:
        """Names of what has to be run, for questions that stand in these places."""

    @abstractmethod
    def prepare(self, tokenizer: Tokenizer, cell: Cell, seed: int) -> Any:
        """What a cell is run on; its `num_tokens` says how much context that takes. UserError if it can't be made."""

    def check(self, parts: Sequence[Part]) -> None:
        """Raises UserError if the task says nothing of methods with these parts."""
        return

    @abstractmethod
    def run(self, desk: Desk, prepared: Any) -> dict[str, Any]:
        """The record of a cell."""

    @abstractmethod
    def scores(self, records: scores.Records, dense: scores.Records | None) -> list[scores.Row]:
        """Rows of the table from the records of all cells; `dense`: dense's of the same, None if these are."""


@dataclass(frozen=True)
class Reading(Task):
    """Reading a book beside float32 (`reading.py`)."""

    score: scores.Scores
    samples = 3
    by_row = True

    def experiments(self, placements: Sequence[str]) -> list[str]:
        return [READING]

    def prepare(self, tokenizer: Tokenizer, cell: Cell, seed: int) -> reading.Excerpt:
        return reading.excerpt(tokenizer, cell.length, cell.index)

    def run(self, desk: Desk, prepared: reading.Excerpt) -> dict[str, Any]:
        reference = desk.references.find(prepared)
        assert reference is not None, "references are made before they are used"
        probe_rows = max((part.capability.last_rows for part in desk.parts), default=0)
        return reading.compare(desk.running, prepared, reference, probe_rows)

    def scores(self, records: scores.Records, dense: scores.Records | None) -> list[scores.Row]:
        return self.score(records, dense)


@dataclass(frozen=True)
class Retrieval(Task):
    """Finding something in a text (`retrieval.py`). A sample is the same for every placement of its question."""

    name: str
    make: Callable[[Draw], Puzzle]

    def experiments(self, placements: Sequence[str]) -> list[str]:
        return [self.name if at == PLACEMENTS[0] else f"{self.name} {at}" for at in placements]

    def prepare(self, tokenizer: Tokenizer, cell: Cell, seed: int) -> retrieval.Sample:
        dice = random.Random(f"{seed}:{self.name}:{cell.length}:{cell.index}")
        puzzle = self.make(Draw(dice, cell.index, cell.length))
        placement = cell.experiment.removeprefix(self.name).strip() or PLACEMENTS[0]
        return retrieval.sample(tokenizer, puzzle, placement, cell.length)

    def run(self, desk: Desk, prepared: retrieval.Sample) -> dict[str, Any]:
        return retrieval.measure(desk.running, desk.tokenizer, prepared)

    def scores(self, records: scores.Records, dense: scores.Records | None) -> list[scores.Row]:
        return scores.retrieval(records, dense)


@dataclass(frozen=True)
class Recall(Task):
    """What a planner leaves out, on the Q, K and V of one dense prefill (`recall.py`); no model runs under it."""

    samples = 1
    by_row = True
    needs_engine = False

    def experiments(self, placements: Sequence[str]) -> list[str]:
        return [RECALL]

    def prepare(self, tokenizer: Tokenizer, cell: Cell, seed: int) -> Passage:
        excerpt = reading.excerpt(tokenizer, cell.length, cell.index)
        return Passage(excerpt.book, tuple(excerpt.ids[: cell.length]))

    def check(self, parts: Sequence[Part]) -> None:
        recall.planners_of(parts)

    def run(self, desk: Desk, prepared: Passage) -> dict[str, Any]:
        return {"book": prepared.book, **recall.measure(desk.captures[prepared], desk.parts)}

    def scores(self, records: scores.Records, dense: scores.Records | None) -> list[scores.Row]:
        return scores.recall(records, dense)


_MAKERS: dict[str, Callable[[Draw], Puzzle]] = {
    **needle.MAKERS,
    "vt": tracing.trace,
    "cwe": counting.common_words,
    "fwe": counting.frequent_words,
    **hops.MAKERS,
}
TASKS: dict[str, Task] = {
    "agreement": Reading(scores.agreement),
    "perplexity": Reading(scores.perplexity),
    "context_gain": Reading(scores.context_gain),
    "recall": Recall(),
    **{name: Retrieval(name, make) for name, make in _MAKERS.items()},
}


def tasks_of(names: Sequence[str]) -> dict[str, Task]:
    """The tasks of these names. Raises UserError that lists the choices."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"no task is called {name!r}; choose one of: {', '.join(TASKS)}")
    return {name: TASKS[name] for name in names}
