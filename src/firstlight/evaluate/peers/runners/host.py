"""The program of a measuring process: one engine, one setting, some prompt lengths. Its job comes on stdin as JSON.

It runs in the peer's own environment, `python -P host.py run_ENGINE.py`, so it knows the standard library only. Each
runner file names the PACKAGES that it stands on, if they can be imported before the job is known, and has one function,
`open_engine(job)`, whose result has `version`, `exact` (None where the caller knows) and
`generate(ids, num_tokens, tell)`, which calls `tell(token)` as each token is known, the first one included.

After each length one JSON line with everything so far goes to stdout, so that what a crash leaves behind still counts;
the last line is the answer. What the engine itself prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

WARM_UP_TOKENS = 64
_GRACE_S = 10
_STRIDE = 997  # where the next prompt begins in the text: no two begin alike, so no cache of prefixes can help


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    signal.alarm(math.ceil(job["limit_s"]) + _GRACE_S)  # ends us, hung or not, if nobody is left who would
    runner, began = load(sys.argv[1]), time.perf_counter()
    for package in getattr(runner, "PACKAGES", ()):
        importlib.import_module(package)
    imported = time.time()
    engine = runner.open_engine(job)
    result: dict[str, Any] = {"load_s": time.perf_counter() - began, "version": engine.version, "lengths": {}}
    if job.get("greeting"):
        result["imported_s"] = imported - job["started"]
        engine.generate(job["greeting"], 1, lambda token: result.update(first_token_s=time.time() - job["started"]))
    run(engine, job, result, answers)
    sys.stderr.flush()
    os._exit(0)  # some engines hang or crash while Python takes them apart; the answer is out


def load(path: str) -> Any:
    """The runner file as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(engine: Any, job: dict[str, Any], result: dict[str, Any], answers: TextIO) -> None:
    """Every length of the job, then its questions, told one by one."""
    prompts = Prompts(job["text"])
    if job["lengths"]:
        timed(engine, prompts.next(WARM_UP_TOKENS), 3)
    for length in job["lengths"]:
        calls = [timed(engine, prompts.next(length), job["tokens"]) for _ in range(job["repeat"] + 1)]
        result["lengths"][str(length)] = summary(calls)
        tell(answers, engine, result)
    result["answers"] = [timed(engine, question, 1)[0] for question in questions(job["text"], *job["questions"])]
    tell(answers, engine, result)


class Prompts:
    """Stretches of one text, repeated without end; each begins elsewhere."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text, self._start = list(text), 0

    def next(self, length: int) -> list[int]:
        self._start = (self._start + _STRIDE) % len(self._text)
        copies = (self._start + length) // len(self._text) + 1
        return (self._text * copies)[self._start : self._start + length]


def questions(text: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` ids, spread over the text: the same for every engine."""
    starts = [n * (len(text) - length) // count for n in range(count)]
    return [list(text[start : start + length]) for start in starts]


def timed(engine: Any, ids: list[int], num_tokens: int) -> tuple[int, list[float]]:
    """The first token, and the seconds from the call to each token."""
    tokens: list[int] = []
    seconds: list[float] = []
    began = time.perf_counter()

    def tell(token: int) -> None:
        seconds.append(time.perf_counter() - began)
        tokens.append(int(token))

    engine.generate(ids, num_tokens, tell)
    if len(tokens) != num_tokens:
        raise RuntimeError(f"{len(tokens)} tokens came instead of {num_tokens}")
    return tokens[0], seconds


def summary(calls: Sequence[tuple[int, list[float]]]) -> dict[str, Any]:
    """Seconds to the first token of the first call and of each later one, and between the tokens after it."""
    first, *steady = [seconds for _, seconds in calls]
    gaps = [statistics.median(b - a for a, b in itertools.pairwise(s)) for s in steady if len(s) > 1]
    return {"first_call_ttft_s": first[0], "ttft_s": [s[0] for s in steady], "tpot_s": gaps}


def tell(answers: TextIO, engine: Any, result: dict[str, Any]) -> None:
    print(json.dumps({**result, "exact": engine.exact, "rss_mb": peak_rss_mb()}), file=answers, flush=True)


def peak_rss_mb() -> float:
    """Peak memory of this program in MB; `getrusage` also counts what the parent held when it started us."""
    try:
        kib = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    except (OSError, TypeError):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kib * 1024 / 1e6, 1)


Tell = Callable[[int], None]

if __name__ == "__main__":
    main()
