"""What sweeps have found, kept in the cache: a peer's settings are tried once for each model, machine and recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from firstlight.evaluate.peers.recipes import Recipe, Variant
from firstlight.kernels.native import processor

CROWDED = 0.25
"""The share of the processor that others may take while a result is measured that is kept."""


class Swept(Protocol):
    """The parts of a task that a sweep depends on."""

    @property
    def digest(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def sweep_at(self) -> int: ...
    @property
    def sweep_again(self) -> bool: ...


class Sweeps:
    """Finds and keeps the result of a variant; a file that can't be written or read only costs another sweep."""

    def __init__(self, file: Path, task: Swept, tell: Callable[[str], None]) -> None:
        self._file, self._task, self._tell = file, task, tell
        self._known = {} if task.sweep_again else _read(file)

    def find(self, recipe: Recipe, variant: Variant) -> dict[str, Any] | None:
        return self._known.get(self._key(recipe, variant))

    def keep(self, recipe: Recipe, variant: Variant, said: dict[str, Any]) -> dict[str, Any]:
        """Append a result, at once, so that an interrupted sweep goes on where it was.

        Failures are tried again, and so is what a busy machine gave: it serves this run and must not decide later ones.
        """
        if said["failed"] or said["elsewhere"] > CROWDED:
            return said
        line = {"key": self._key(recipe, variant), "peer": variant.peer, "setting": variant.label, **said}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(f"{json.dumps(line)}\n")
        except OSError as error:
            self._tell(f"the sweep can't be kept ({error.strerror or error})")
        return said

    def _key(self, recipe: Recipe, variant: Variant) -> str:
        task = self._task
        facts = [task.digest, task.threads, task.sweep_at, processor(), list(map(list, recipe.install))]
        said = json.dumps([*facts, variant.peer, variant.label, variant.exact])
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The last result of each key."""
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        return {line["key"]: line for line in lines}
    except (OSError, ValueError, KeyError):
        return {}
