"""The grid of runs behind `firstlight eval`: settings x samples, one model in memory at a time, resumable.

First float32 reads what it has not read before (`reference.py`), then dense runs at its usual precision, then the
settings in question, then controls that got as much as each of them took. Each finished run is a record, one line of
the results file, so an interrupted grid goes on where it was, and many methods share one dense.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from firstlight.core.config import Options, int8_parts
from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.core.registry import Part, make_parts
from firstlight.evaluate import books
from firstlight.evaluate.reading import Excerpt
from firstlight.evaluate.recall import Captured, capture, layers_of
from firstlight.evaluate.records import Record, Records
from firstlight.evaluate.reference import References
from firstlight.evaluate.retrieval import PLACEMENTS
from firstlight.evaluate.scores import together
from firstlight.evaluate.settings import controls, dense_of, effect_of, is_edited, name_of
from firstlight.evaluate.tasks import TASKS, Cell, Desk, Passage, Task, tasks_of
from firstlight.llm import LLM
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.prompt.tokenizer import Tokenizer

LAYOUT = 2
"""Raise it when the same cell means another prompt or another record than before."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Grid:
    """What is asked for: tasks by name, prompt lengths in tokens, samples of each (None: as each task is used to).

    `placements`: where the questions of retrieval stand.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int | None = None
    placements: Sequence[str] = PLACEMENTS[:1]

    def __post_init__(self) -> None:
        tasks_of(self.tasks)
        if not self.tasks or not self.lengths:
            raise UserError(f"nothing to measure; give --tasks of {', '.join(TASKS)}, and --lengths")
        if min(self.lengths) < 1 or (self.samples is not None and self.samples < 1):
            raise UserError("lengths and samples are numbers; give 1 or more")
        if not self.placements or not set(self.placements) <= set(PLACEMENTS):
            raise UserError(f"questions stand in {', '.join(PLACEMENTS)}; give --placements of these")

    def cells(self, name: str, length: int) -> list[Cell]:
        """The runs that the rows of one task and length need."""
        task = TASKS[name]
        count = range(self.samples or task.samples)
        return [Cell(experiment, length, i) for experiment in task.experiments(self.placements) for i in count]

    def owners(self) -> dict[Cell, Task]:
        """Every run, each once, and a task that knows how to do it."""
        return {c: TASKS[name] for length in self.lengths for name in self.tasks for c in self.cells(name, length)}


@dataclass(frozen=True)
class Work:
    """A cell that was prepared."""

    task: Task
    prepared: Any


class Subject:
    """A model under some settings, and its records."""

    def __init__(self, model: str, options: Options, digest: str, records: Records, parts: Sequence[Part]) -> None:
        self.model, self.options, self._digest, self._records = model, _alone(options), digest, records
        calibrations = _calibrations(parts)
        self._calibrations = {"calibrations": calibrations} if calibrations else {}
        self.parts = parts

    def run_of(self, cell: Cell) -> Record:
        """What names a record: nothing else may change its figures."""
        settings = {"settings": asdict(self.options), **self._calibrations}
        return {"model": self._digest, "layout": LAYOUT, **settings, **asdict(cell)}

    def records(self, cells: Iterable[Cell]) -> list[Record]:
        """The records of cells that were run."""
        found = [self._records.find(self.run_of(cell)) for cell in cells]
        return [record for record in found if record is not None]

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that have no record yet."""
        return [cell for cell in cells if not self.records([cell])]

    def run(self, work: Mapping[Cell, Work], desk: Desk, progress: Any, tell: Tell) -> None:
        """Run every cell that has no record yet."""
        free, bound = ([c for c in self.missing(work) if work[c].task.needs_engine == needs] for needs in (False, True))
        self._run({cell: work[cell] for cell in free}, desk, tell)
        if bound:
            with open_llm(self.model, self.options, progress) as llm:
                self._run({cell: work[cell] for cell in bound}, replace(desk, engine=llm.engine), tell)

    def _run(self, work: Mapping[Cell, Work], desk: Desk, tell: Tell) -> None:
        for n, (cell, what) in enumerate(work.items()):
            tell(f"{name_of(self.options)}: {cell.experiment}, {cell.length} tokens, {n + 1} of {len(work)}")
            self._records.add(self.run_of(cell), what.task.run(desk, what.prepared))


class Session:
    """One call of `evaluate`: a model, its prepared cells, and where their records are."""

    def __init__(self, model: str, grid: Grid, options: Options, out: Path | None, progress: Any, tell: Tell) -> None:
        self.model, self.grid, self.progress, self.tell = model, grid, progress, tell
        self.records = Records(out)
        self.checkpoint = open_checkpoint(resolve(model))
        self.references = References(self.checkpoint.digest)
        self._tokenizer = Tokenizer.from_source(self.checkpoint.tokenizer_source)
        self._options = options
        self.captures: dict[Passage, Captured] = {}
        self.work: dict[Cell, Work] = {}

    def subject(self, options: Options) -> Subject:
        """Raises UserError if the setting can't be judged on this grid."""
        facts = self.checkpoint.config.facts(self.checkpoint.digest)
        return Subject(self.model, options, self.checkpoint.digest, self.records, make_parts(options.methods, facts))

    def prepare(self) -> None:
        """All cells. Raises UserError if one of them doesn't fit into the context."""
        limit = min(
            self._options.max_model_len or self.checkpoint.config.max_context, self.checkpoint.config.max_context
        )
        for cell, task in self.grid.owners().items():
            if cell.length > limit:  # before so much text is put together
                raise UserError(f"{cell.length} tokens are beyond the model's limit of {limit}; give shorter --lengths")
            prepared = task.prepare(self._tokenizer, cell, self._options.seed)
            _check_context(cell, prepared.num_tokens, limit)
            self.work[cell] = Work(task, prepared)

    def run(self, subject: Subject, length: int | None = None) -> None:
        """Every cell; of a control those of its length that it is a control for."""
        wanted = {cell: work for cell, work in self.work.items() if length is None}
        if length is not None:
            wanted = {c: w for c, w in self.work.items() if c.length == length and _concerns(w.task, subject.options)}
        self._capture([w.prepared for c, w in wanted.items() if c in subject.missing(wanted)])
        desk = Desk(subject.parts, self._tokenizer, self.references, self.captures)
        subject.run(wanted, desk, self.progress, self.tell)

    def _capture(self, prepared: Sequence[Any]) -> None:
        """Q, K and V of dense for the passages among these; they are kept for all settings of this call."""
        passages = [p for p in prepared if isinstance(p, Passage) and p not in self.captures]
        if not passages:
            return
        layers = layers_of(self.checkpoint.config.windows)
        with open_llm(self.model, _alone(dense_of(self._options)), self.progress) as llm:
            for passage in passages:
                self.tell(f"Q, K and V of dense: {len(passage.ids)} tokens")
                self.captures[passage] = capture(llm.engine, PromptIds(passage.ids), layers)

    def refer(self) -> None:
        """Make the float32 references that are not there."""
        excerpts = [w.prepared for w in self.work.values() if isinstance(w.prepared, Excerpt)]
        missing = [excerpt for excerpt in excerpts if self.references.find(excerpt) is None]
        if not missing:
            return
        with open_llm(self.model, _alone(replace(dense_of(self._options), precision="f32")), self.progress) as llm:
            for n, excerpt in enumerate(missing):
                self.tell(f"float32 reference: {excerpt.length} tokens, {n + 1} of {len(missing)}")
                self.references.make(llm.engine, excerpt)

    def controls(self, subjects: Sequence[Subject], length: int) -> list[Subject]:
        """What each method has to beat at a length, with as much as it took there; none of them twice."""
        found: dict[str, Options] = {}
        for subject in subjects:
            records = subject.records(cell for cell in self.work if cell.length == length)
            if records and subject.options.method:
                took = [statistics.fmean(r[key] for r in records) for key in ("density", "computed", "prompt_tokens")]
                for control in controls(subject.options, took[0], took[1], round(took[2]), self.checkpoint.config):
                    found[name_of(control)] = control
        if not torch.cpu._is_vnni_supported():
            found = {name: control for name, control in found.items() if not int8_parts(control.precision)}
        known = {effect_of(subject.options) for subject in subjects}
        return [self.subject(control) for control in found.values() if effect_of(control) not in known]


def evaluate(
    model: str,
    options: Options,
    grid: Grid,
    *,
    against: Sequence[Options] = (),
    with_controls: bool = False,
    out: Path | None = None,
    progress: Any = None,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """`rows` for the settings asked for, for `against`, their controls, and for dense beside them.

    `paired`: what each setting won and lost in all retrieval together; `texts`: what was read. Raises UserError on
    settings or lengths that cannot be, before anything is run.
    """
    settings = {name_of(o): o for o in (dense_of(options), options, *against)}
    for setting in settings.values():
        _check(make_parts(setting.methods), grid)
    session = Session(model, grid, options, out, progress, tell)
    subjects = [session.subject(setting) for setting in settings.values()]
    session.prepare()
    session.refer()
    for subject in subjects:
        session.run(subject)
    rows = []
    for length in grid.lengths:
        beside = session.controls(subjects, length) if with_controls else []
        for control in beside:
            session.run(control, length)
        rows += [row for name in grid.tasks for row in _rows(grid, name, length, [*subjects, *beside])]
    texts = {book: books.digest_of(book) for book in books.BOOKS}
    return {"model": model, "rows": rows, "paired": together(rows), "texts": texts}


def _check(parts: Sequence[Part], grid: Grid) -> None:
    """Some tasks compare rows at their places, and a shortened prompt's rows have others."""
    editors = [part.method for part in parts if part.seam == "prompt"]
    reading = [name for name, task in tasks_of(grid.tasks).items() if task.by_row]
    if editors and reading:
        raise UserError(
            f"{' and '.join(reading)} compare row by row, and {editors[0]} takes rows out, so the rest stand elsewhere"
            "; choose --tasks niah_single_1 or another needle"
        )
    for task in tasks_of(grid.tasks).values():
        task.check(parts)


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


def open_llm(model: str, options: Options, progress: Any) -> LLM:
    """The model under these options."""
    return LLM(model, progress=progress, **{field.name: getattr(options, field.name) for field in fields(options)})


def _alone(options: Options) -> Options:
    """One request at a time, and nothing known beforehand."""
    return replace(options, prefix_cache="off", max_num_seqs=1)


def _rows(grid: Grid, name: str, length: int, subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """A task's rows at one length: dense's, then those of the settings asked for."""
    task, cells = TASKS[name], grid.cells(name, length)
    dense, rows = subjects[0].records(cells), []
    for subject in subjects:
        records = subject.records(cells)
        if not records:
            continue
        common = {
            "task": name,
            "length": length,
            "settings": asdict(subject.options),
            "name": name_of(subject.options),
            "ttft_s": _median([record["ttft_s"] for record in records]),
            "density": statistics.fmean(record["density"] for record in records),
            "methods": records[0]["methods"],
        }
        rows += [common | row for row in task.scores(records, None if subject is subjects[0] else dense)]
    return [_plain(row) for row in rows]


def _concerns(task: Task, control: Options) -> bool:
    """Shortened prompts have other rows, float32 is what rows are compared with, a precision plans nothing."""
    if is_edited(control) or control.precision == "f32":
        return not task.by_row
    return task.needs_engine or bool(control.method)


def _median(seconds: Sequence[float | None]) -> float | None:
    """None where nothing was timed."""
    timed = [second for second in seconds if second is not None]
    return statistics.median(timed) if timed else None


def _plain(value: Any) -> Any:
    """NaN, which JSON doesn't have, becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_context(cell: Cell, need: int, limit: int) -> None:
    if need > limit:
        raise UserError(
            f"a prompt of {cell.length} tokens takes {need} with what follows it, the model's limit is {limit}; "
            f"give --lengths up to {limit - need + cell.length}"
        )
