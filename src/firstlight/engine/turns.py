"""Turns: many threads wait for tokens, one at a time steps the engine for all of them.

Between the Python API and the engine's loop. Whoever waits first steps; the others sleep until that step has ended and
look whether it brought what they wait for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from firstlight.core.errors import UserError
from firstlight.core.request import TokenOutput
from firstlight.engine.engine import Engine


class Turns:
    """`deliver` gets each output, on the thread that steps, before anybody else steps. Nobody steps when `is_over`."""

    def __init__(self, engine: Engine, deliver: Callable[[TokenOutput], None]) -> None:
        self._engine, self._deliver = engine, deliver
        self._changed = threading.Condition()
        self._stepper: int | None = None
        self._num_alone = 0
        """Threads that are alone or wait to be: else whoever steps would step again before they noticed."""
        self.is_over = False

    def step(self) -> None:
        """One step of the engine, or the end of the one that another thread takes."""
        mine = False
        try:
            with self._changed:
                self._refuse_nesting()
                if self.is_over:
                    return
                if self._stepper is not None or self._num_alone:
                    self._changed.wait()
                    return
                mine, self._stepper = True, threading.get_ident()
            for output in self._engine.step():
                self._deliver(output)
        finally:
            if mine:
                with self._changed:
                    self._stepper = None
                    self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody steps while this lasts."""
        with self._changed:
            self._refuse_nesting()
            self._num_alone += 1
            try:
                self._changed.wait_for(lambda: self._stepper is None)
                yield
            finally:
                self._num_alone -= 1
                self._changed.notify_all()

    def wait_for_work(self) -> bool:
        """Sleep until the engine has something to do; False when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over or self._engine.has_work)
        return not self.is_over

    def wake(self) -> None:
        """A request came, or all is over."""
        with self._changed:
            self._changed.notify_all()

    def _refuse_nesting(self) -> None:
        if self._stepper == threading.get_ident():
            raise UserError("a progress callback can't ask the model that calls it; do it after the answer")
