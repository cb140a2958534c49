"""Between the engine and the parts of methods: what a part raises becomes one kind of error that names the request.

The engine then computes that request anew, dense, and says so; no method can take others down with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firstlight.core.registry import Part


class PartFailed(Exception):
    """A part raised while it served a request."""

    def __init__(self, rid: str, method: str, error: Exception) -> None:
        said = str(error) or type(error).__name__
        super().__init__(f"{method} failed: {said.splitlines()[0]}")
        self.rid, self.method = rid, method


class Guarded:
    """A part as one request sees it: its attributes, and hooks that raise `PartFailed` only."""

    def __init__(self, rid: str, part: Part) -> None:
        self._rid, self._part = rid, part

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part.impl, name)
        return self._hook(value) if callable(value) else value

    def _hook(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                raise PartFailed(self._rid, self._part.method, error) from error

        return call
