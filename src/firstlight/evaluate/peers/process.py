"""One measuring process: it gets a job, and gives back its last line of JSON or the reason why there is none.

Whatever happens in there stays there: an error, a crash and a hang are a `Failed` with one line, never an exception.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNERS = Path(__file__).parent / "runners"
_REASON_CHARS = 200
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a process answered before it ended, and why it ended badly if it did.

    `elsewhere` is the share of the machine's processor time that all others took meanwhile: a figure beside a busy
    neighbour is no figure.
    """

    answer: dict[str, Any] | None
    failed: str | None = None
    elsewhere: float = field(default=0.0, compare=False)


def run(command: Sequence[str], job: Mapping[str, Any], *, limit_s: float, env: Mapping[str, str]) -> Outcome:
    """Run a command with a job on its stdin for `limit_s` seconds at most; its children end with it."""
    others = _others()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env),
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(None, f"can't be started ({error.strerror or error})")
    try:
        out, err = process.communicate(json.dumps(job).encode(), timeout=limit_s)
        failed = _failure(process.returncode, err)
    except subprocess.TimeoutExpired:
        _end(process)
        out, err = process.communicate()
        failed = f"no answer within {limit_s:g} s"
    finally:
        _end(process)
    answer = _last_answer(out)
    failed = failed if answer is not None or failed else "ended without an answer"
    return Outcome(answer, failed, _share(others, _others()))


def measure(python: Path, runner: str, job: Mapping[str, Any], *, limit_s: float, env: Mapping[str, str]) -> Outcome:
    """The job through `runners/host.py` and one engine's runner. `-P`: no file of ours hides a package of theirs."""
    command = [str(python), "-P", str(RUNNERS / "host.py"), str(RUNNERS / runner)]
    return run(command, job, limit_s=limit_s, env=env)


def without_paths(text: str) -> str:
    """The text with every absolute path cut down to its last part: results tell nothing of this machine's folders."""
    return re.sub(r"(?:/[^\s/:'\",()]+)+/([^\s/:'\",()]*)", r"\1", text)


def _others() -> tuple[float, float]:
    """Processor seconds that neither we nor our ended children have used, and all there were; (0, 0) if untold."""
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0
    total = sum(fields) / os.sysconf("SC_CLK_TCK")
    idle = (fields[3] + fields[4]) / os.sysconf("SC_CLK_TCK")
    ours = os.times()
    return total - idle - sum(ours[:4]), total


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    passed = after[1] - before[1]
    return round(min(max((after[0] - before[0]) / passed, 0.0), 1.0), 3) if passed > 0 else 0.0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and the session that it leads; what it is writing it may take away before."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _failure(code: int, stderr: bytes) -> str | None:
    """None for success; else what ended the process, in one line."""
    if code == 0:
        return None
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return without_paths((errors or lines or [f"exit code {code}"])[-1])[:_REASON_CHARS]


def _last_answer(stdout: bytes) -> dict[str, Any] | None:
    for line in reversed(stdout.splitlines()):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
    return None
