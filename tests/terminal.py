"""A program on a terminal of its own, and somebody who types."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

_ESCAPES = re.compile(r"\x1b(\[[\d;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """Runs `python ARGUMENTS`; `expect` reads until a text has come, `type` presses keys."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
        self._master, slave = pty.openpty()
        given = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "LINES": "40", **(env or {})}
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=given,
            start_new_session=True,
            close_fds=True,
        )
        os.close(slave)
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def interrupt(self, expected: str) -> str:
        """Ctrl-C until `expected` comes: one that falls between readline's prompt and its waiting is not heard."""
        for _ in range(60):
            self._process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 1
            while expected not in self._unread and (more := self._read(deadline)) is not None:
                self._unread += more
            if expected in self._unread:
                break
        return self.expect(expected, 0)

    def expect(self, text: str, seconds: float = 60) -> str:
        """Everything up to and with `text`, without colours. Fails if it doesn't come."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            more = self._read(deadline)
            assert more is not None, f"{text!r} didn't come; what came: {self._unread!r}"
            self._unread += more
        seen, _, self._unread = self._unread.partition(text)
        return seen + text

    def leave(self, seconds: float = 60) -> int:
        """The exit code, and nothing unread but what came after."""
        deadline = time.monotonic() + seconds
        while (more := self._read(deadline)) is not None:
            self._unread += more
        return self._process.wait(max(deadline - time.monotonic(), 1))

    @property
    def unread(self) -> str:
        return self._unread

    def _read(self, deadline: float) -> str | None:
        """What came next; None when the program has ended or the time is over."""
        ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
        try:
            data = os.read(self._master, 65536) if ready else b""
        except OSError:  # the program closed its side
            data = b""
        return _ESCAPES.sub("", data.decode(errors="replace")).replace("\r", "") if data else None
