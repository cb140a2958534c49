"""The grid of runs behind `firstlight eval`: settings x samples, one model in memory at a time, resumable.

First float32 reads what it has not read before (`reference.py`), then dense runs at its usual precision, then the
settings in question. Each finished run is a record, one line of the results file, so an interrupted grid goes on where
it was, and many methods share one dense.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.registry import Part, make_parts
from firstlight.evaluate import books
from firstlight.evaluate.reading import Excerpt
from firstlight.evaluate.records import Record, Records
from firstlight.evaluate.reference import References
from firstlight.evaluate.tasks import READING, TASKS, Cell, Task, num_tokens, prepare, run_cell, tasks_of
from firstlight.llm import LLM
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.prompt.tokenizer import Tokenizer

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Grid:
    """What is asked for: tasks by name, prompt lengths in tokens, samples of each (None: as each task is used to)."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int | None = None

    def __post_init__(self) -> None:
        tasks_of(self.tasks)
        if not self.tasks or not self.lengths:
            raise UserError(f"nothing to measure; give --tasks of {', '.join(TASKS)}, and --lengths")
        if min(self.lengths) < 1 or (self.samples is not None and self.samples < 1):
            raise UserError("lengths and samples are numbers; give 1 or more")

    def cells(self, task: Task, length: int) -> list[Cell]:
        """The runs that one row of the table needs."""
        return [Cell(task.experiment, length, i) for i in range(self.samples or task.samples)]

    def all_cells(self) -> list[Cell]:
        """Every run, each once."""
        wanted = tasks_of(self.tasks).values()
        return list(dict.fromkeys(c for length in self.lengths for task in wanted for c in self.cells(task, length)))


class Subject:
    """A model under some settings, and its records."""

    def __init__(
        self, model: str, options: Options, digest: str, records: Records, calibrations: Record | None = None
    ) -> None:
        self.model, self.options, self._digest, self._records = model, _alone(options), digest, records
        self._calibrations = {"calibrations": calibrations} if calibrations else {}

    def run_of(self, cell: Cell) -> Record:
        """What names a record: nothing else may change its figures."""
        return {"model": self._digest, "settings": asdict(self.options), **self._calibrations, **asdict(cell)}

    def records(self, cells: Iterable[Cell]) -> list[Record]:
        """The records of cells that were run."""
        found = [self._records.find(self.run_of(cell)) for cell in cells]
        return [record for record in found if record is not None]

    def run(self, prepared: dict[Cell, Any], references: References, progress: Any, tell: Tell) -> None:
        """Run every cell that has no record yet."""
        missing = [cell for cell in prepared if not self.records([cell])]
        if not missing:
            return
        with open_llm(self.model, self.options, progress) as llm:
            for n, cell in enumerate(missing):
                tell(f"{name_of(self.options)}: {cell.experiment}, {cell.length} tokens, {n + 1} of {len(missing)}")
                record = run_cell(llm.engine, llm.tokenizer, prepared[cell], references)
                self._records.add(self.run_of(cell), record)


def evaluate(
    model: str,
    options: Options,
    grid: Grid,
    *,
    out: Path | None = None,
    progress: Any = None,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """`rows` for the settings asked for and, if they are others, for dense beside them; `texts` that were read.

    Raises UserError on settings or lengths that cannot be, before anything is run.
    """
    records = Records(out)
    _check_editors(make_parts(options.methods), grid)
    checkpoint = open_checkpoint(resolve(model))
    calibrations = _calibrations(make_parts(options.methods, checkpoint.config.facts(checkpoint.digest)))
    cells = grid.all_cells()
    _check_context(cells, min(options.max_model_len or checkpoint.config.max_context, checkpoint.config.max_context))
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer_source)
    prepared = {cell: prepare(tokenizer, cell, options.seed) for cell in cells}
    references = References(checkpoint.digest)
    asked = Subject(model, options, checkpoint.digest, records, calibrations)
    dense = Subject(model, dense_of(options), checkpoint.digest, records)
    _refer(model, options, [p for p in prepared.values() if isinstance(p, Excerpt)], references, progress, tell)
    subjects = [dense] if asked.options == dense.options else [dense, asked]
    for subject in subjects:
        subject.run(prepared, references, progress, tell)
    rows = [row for length in grid.lengths for name in grid.tasks for row in _rows(grid, name, length, subjects)]
    return {"model": model, "rows": rows, "texts": {book: books.digest_of(book) for book in books.BOOKS}}


def _check_editors(parts: Sequence[Part], grid: Grid) -> None:
    """Reading compares rows at their places, and a shortened prompt's rows have others."""
    editors = [part.method for part in parts if part.seam == "prompt"]
    reading = [name for name, task in tasks_of(grid.tasks).items() if task.experiment == READING]
    if editors and reading:
        raise UserError(
            f"{' and '.join(reading)} compare row by row, and {editors[0]} takes rows out, so the rest stand elsewhere"
            "; choose --tasks niah_single_1 or another needle"
        )


def _calibrations(parts: Sequence[Part]) -> dict[str, str]:
    """Method -> digest of its calibration. Raises UserError if one has seen what it would be judged on."""
    found = {part.method: part.calibration for part in parts if part.calibration is not None}
    for method, calibration in found.items():
        for book in books.BOOKS:
            if books.digest_of(book) in calibration.texts.values():
                raise UserError(
                    f"the calibration {calibration.path} of {method} was made on {book}, which `eval` judges on; "
                    f"make one with `firstlight calibrate MODEL {method}`"
                )
    return {method: calibration.digest for method, calibration in found.items()}


def dense_of(options: Options) -> Options:
    """What a setting is compared with: no method, the default precision, all else equal."""
    return replace(options, method=(), precision="bf16")


def name_of(options: Options) -> str:
    """A setting in a few words: `band:window=512, bf16`."""
    methods = [f"{m.name}{':' * bool(m.settings)}{_settings_text(m.settings)}" for m in options.methods]
    return ", ".join([*(methods or ["dense"]), options.precision])


def open_llm(model: str, options: Options, progress: Any) -> LLM:
    """The model under these options."""
    return LLM(model, progress=progress, **{field.name: getattr(options, field.name) for field in fields(options)})


def _alone(options: Options) -> Options:
    """One request at a time, and nothing known beforehand."""
    return replace(options, prefix_cache="off", max_num_seqs=1)


def _refer(
    model: str, options: Options, excerpts: Sequence[Excerpt], references: References, progress: Any, tell: Tell
) -> None:
    """Make the float32 references that are not there."""
    missing = [excerpt for excerpt in excerpts if references.find(excerpt) is None]
    if not missing:
        return
    with open_llm(model, _alone(replace(options, method=(), precision="f32")), progress) as llm:
        for n, excerpt in enumerate(missing):
            tell(f"float32 reference: {excerpt.length} tokens, {n + 1} of {len(missing)}")
            references.make(llm.engine, excerpt)


def _rows(grid: Grid, name: str, length: int, subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """A task's rows at one length: dense's, then those of the settings asked for."""
    task = TASKS[name]
    cells = grid.cells(task, length)
    dense, rows = subjects[0].records(cells), []
    for subject in subjects:
        records = subject.records(cells)
        common = {
            "task": name,
            "length": length,
            "settings": asdict(subject.options),
            "name": name_of(subject.options),
            "ttft_s": statistics.median(record["ttft_s"] for record in records),
            "density": statistics.fmean(record["density"] for record in records),
            "methods": records[0]["methods"],
        }
        rows += [common | row for row in task.scores(records, None if subject is subjects[0] else dense)]
    return [_plain(row) for row in rows]


def _plain(value: Any) -> Any:
    """NaN, which JSON doesn't have, becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_context(cells: Iterable[Cell], limit: int) -> None:
    for cell in cells:
        if (need := num_tokens(cell)) > limit:
            raise UserError(
                f"a prompt of {cell.length} tokens takes {need} with what follows it, the model's limit is {limit}; "
                f"give --lengths up to {limit - need + cell.length}"
            )


def _settings_text(settings: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())
