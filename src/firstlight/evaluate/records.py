"""Records of finished runs, one JSON line each: what makes a grid of runs resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firstlight.core.errors import UserError

Record = dict[str, Any]

_BEGINNING = '{"run": '


class Records:
    """Finished runs by what was run. With a file: those of earlier calls too, and each new one at once on the disk."""

    def __init__(self, path: Path | None) -> None:
        """Raises UserError on a file that can't be written, or that holds something else."""
        self._path = path
        self._found = {} if path is None else _open(path)

    def find(self, run: Record) -> Record | None:
        """The record of a run that is named by these facts."""
        return self._found.get(_key(run))

    def add(self, run: Record, record: Record) -> None:
        self._found[_key(run)] = record
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"run": run, "record": record}, default=str) + "\n")


def _key(run: Record) -> str:
    return json.dumps(run, sort_keys=True, default=str)


def _open(path: Path) -> dict[str, Record]:
    """The records of a results file, made if it isn't there; a last line that was cut off is removed."""
    try:
        path.touch()
        *whole, cut = path.read_text("utf-8").split("\n")
        if not (cut.startswith(_BEGINNING) or _BEGINNING.startswith(cut)):
            raise ValueError(cut)
        lines = [json.loads(line) for line in whole]
        found = {_key(line["run"]): dict(line["record"]) for line in lines}
        if cut:
            path.write_text("".join(f"{line}\n" for line in whole), "utf-8")
        return found
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}; give another --out") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds something else than results of firstlight eval; give another --out") from None
