"""Progress bars on a terminal's stderr: preparing a model, and prefills long enough to wonder about."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE_S = 0.4
"""A phase shorter than this shows no bar."""
REFRESH_S = 0.1

_LABELS = {"load": "preparing the model", "prefill": "reading the prompt"}


class Report(Protocol):
    """What the engine tells: how much of a phase is done."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> float: ...
    @property
    def total(self) -> float: ...


class Bars:
    """A progress sink. Each phase gets one bar, which goes when the phase is done or `close` is called."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._began: dict[str, float] = {}
        self._shown = 0.0
        self._bar: Progress | None = None
        self._task: tuple[str, TaskID] | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, report: Report) -> None:
        """Called often: does nothing on most calls, and nothing at all when stderr is not a terminal."""
        now = time.monotonic()
        if not self._console.is_terminal or report.phase not in _LABELS:
            return
        began = self._began.setdefault(report.phase, now)
        if report.done >= report.total:
            self._began.pop(report.phase)
            self.close()
        elif now - began >= PATIENCE_S and now - self._shown >= REFRESH_S:
            self._shown = now
            self._show(report)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _show(self, report: Report) -> None:
        if self._bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        if self._task is None or self._task[0] != report.phase:
            self._task = report.phase, self._bar.add_task(_LABELS[report.phase], total=report.total)
        self._bar.update(self._task[1], completed=report.done, total=report.total)
