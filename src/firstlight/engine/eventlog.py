"""The event log: a run written down step by step, enough to make every plan of it again.

JSON lines: a header with version and config, one {"now", "events", "plan"} a step, and an end line with a digest of all
lines before it. The engine and the simulator write it beside their loops; `firstlight simulate --replay` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.schedule import Event, Plan, event_from_json, to_json
from firstlight.core.view import ViewConfig

VERSION = 1


def canonical(value: Any) -> str:
    """The one spelling of plain data as JSON, so that equal plans are equal bytes."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))


class EventLog:
    """Writes one run; whole lines reach the file at once, so a crash leaves a log that lacks only its end.

    As a context manager it writes the end line only if nothing was raised. Raises UserError if the file can't be made.
    """

    def __init__(self, path: str | Path, config: ViewConfig) -> None:
        try:
            self._file = Path(path).open("w", encoding="utf-8", newline="\n")  # noqa: SIM115 - we are its manager
        except OSError as error:
            raise UserError(f"can't write the event log {path}: {error.strerror}; give another file") from error
        self._hash = hashlib.sha256()
        self._steps = 0
        self._line({"config": dataclasses.asdict(config), "version": VERSION})

    def step(self, now: float, events: Sequence[Event], plan: Plan) -> None:
        self._steps += 1
        self._line({"now": now, "events": events, "plan": plan})

    def end(self) -> None:
        """The run is over and the log complete."""
        self._line({"end": {"sha256": self._hash.hexdigest(), "steps": self._steps}})
        self.close()

    def close(self) -> None:
        """Leaves the log without its end line if `end` wasn't called: a replay will refuse it."""
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.end()
        self.close()

    def _line(self, value: dict[str, Any]) -> None:
        line = canonical(value) + "\n"
        self._hash.update(line.encode())
        self._file.write(line)
        self._file.flush()


@dataclass(frozen=True)
class Step:
    """One step as it was logged; the plan in its canonical spelling."""

    now: float
    events: tuple[Event, ...]
    plan: str


def read_log(path: str | Path) -> tuple[ViewConfig, list[Step]]:
    """The config and the steps of a complete log. Raises UserError if it is unfinished, corrupt or of another version.

    The digest is checked before anything is believed, but for the version: other versions may have another end.
    """
    try:
        *lines, last = Path(path).read_bytes().splitlines(keepends=True)
        header = json.loads(lines[0] if lines else last)
        if header["version"] != VERSION:
            raise UserError(f"{path} is an event log of version {header['version']}; this program reads {VERSION}")
        _check_end(path, lines, last)
        return ViewConfig(**header["config"]), [_step(json.loads(line)) for line in lines[1:]]
    except OSError as error:
        raise UserError(f"can't read the event log {path}: {error.strerror}; give another file") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no event log, or a corrupt one; write it again with --event-log") from error


def _check_end(path: str | Path, lines: list[bytes], last: bytes) -> None:
    if not last.startswith(b'{"end":') or not last.endswith(b"\n"):
        raise UserError(f"the event log {path} has no end line: its run did not finish; write it again")
    if json.loads(last)["end"]["sha256"] != hashlib.sha256(b"".join(lines)).hexdigest():
        raise UserError(f"the event log {path} was changed after it was written; write it again")


def _step(body: dict[str, Any]) -> Step:
    events = tuple(event_from_json(event) for event in body["events"])
    return Step(body["now"], events, canonical(body["plan"]))
