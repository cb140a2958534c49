"""Progress bars on a terminal's stderr: fetching and preparing a model, and prefills long enough to wonder about."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE_S = 0.4
"""A phase shorter than this shows no bar."""
REFRESH_S = 0.1

_LABELS = {"fetch": "fetching the model", "load": "preparing the model", "prefill": "reading the prompt"}


class Report(Protocol):
    """What the engine tells: how much of a phase is done."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> float: ...
    @property
    def total(self) -> float: ...


class Bars:
    """Progress sinks that share one bar: it goes when its work is done or `close` is called."""

    def __init__(self, console: Console | None = None, *, phases: Collection[str] = tuple(_LABELS)) -> None:
        self._console, self._phases = console or Console(stderr=True), phases
        self._began: dict[str, float] = {}
        self._shown = 0.0
        self._bar: Progress | None = None
        self._task: tuple[str, TaskID] | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, report: Report) -> None:
        """The sink of an `LLM`. Phases that it wasn't made for show nothing."""
        if report.phase in self._phases:
            self.tell(_LABELS[report.phase], report.done, report.total)

    def shares(self, label: str) -> Callable[[float], None]:
        """A sink of shares in [0, 1] of the work that `label` names."""
        return lambda share: self.tell(label, share, 1.0)

    def close(self) -> None:
        """Takes the bar off the screen; what comes next is new work."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
        self._began.clear()

    def tell(self, label: str, done: float, total: float) -> None:
        """A sink of the work that `label` names; called often. What follows a colon is news of the same work.

        It does nothing on most calls, and nothing at all when stderr is not a terminal.
        """
        now = time.monotonic()
        if not self._console.is_terminal:
            return
        work = label.partition(":")[0]
        if self._task is not None and self._task[0] != work:
            self.close()
        began = self._began.setdefault(work, now)
        if done >= total:
            self.close()
        elif now - began >= PATIENCE_S and now - self._shown >= REFRESH_S:
            self._shown = now
            self._show(label, done, total)

    def _show(self, label: str, done: float, total: float) -> None:
        if self._bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        if self._task is None:
            self._task = label.partition(":")[0], self._bar.add_task(label, total=total)
        self._bar.update(self._task[1], description=label, completed=done, total=total)
