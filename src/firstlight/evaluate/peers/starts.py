"""How long engines take from the start of their process to a first token, and the memory that this takes.

Each start is a process of its own with a prompt of ten tokens. Ours is told twice: with an empty cache folder, as the
first time with a model, and as ever after. The others keep nothing. The model's file has been read before every start,
so it comes from the system's memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.evaluate.peers import process
from firstlight.evaluate.peers.environments import environment, python_of
from firstlight.evaluate.peers.recipes import Recipe, Variant, ours, recipes
from firstlight.evaluate.speed import spread

GREETING = 10
"""Tokens of the prompt."""
PEERS = ("llama.cpp", "transformers")
_CONTEXT = 512
_OWN = "firstlight"


@dataclass
class Start:
    """One engine in one state, and what its processes have said."""

    recipe: Recipe
    variant: Variant
    state: str
    """`cold`: nothing derived from the model is there. `again`: what an earlier start left is."""
    answers: list[Mapping[str, Any]] = field(default_factory=list)
    failed: str | None = None
    elsewhere: float = 0.0


def measure(
    path: Path,
    text: Sequence[int],
    options: Options,
    against: Sequence[str],
    *,
    threads: int,
    repeat: int,
    limit_s: float,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """A row for each engine and state: medians over `repeat` rounds, in which the engines take turns."""
    starts = _starts(options, against)
    job: dict[str, Any] = {
        "model": str(path),
        "threads": threads,
        "limit_s": limit_s,
        "max_len": _CONTEXT,
        "text": [],
        "lengths": [],
    }
    job |= {"greeting": list(text[:GREETING]), "questions": (0, 0)}
    path.read_bytes()
    for number in range(repeat):
        for start in (start for start in starts if start.failed is None):
            tell(f"{path.name}, round {number + 1}/{repeat}: {start.variant.peer} {start.state}")
            _run(start, job, limit_s, tell)
    yield from (_row(start) for start in starts)


def _starts(options: Options, against: Sequence[str]) -> list[Start]:
    for name in against:
        if name not in PEERS:
            raise UserError(f"no start of {name!r} can be measured; choose from: {', '.join(PEERS)}")
    own = ours(_OWN, options)
    variant = next(v for v in own.variants if v.settings["precision"] == options.precision)
    starts = [Start(own, variant, "cold"), Start(own, variant, "again")]
    for recipe in recipes(against, options)[1:]:
        file = next((v for v in recipe.variants if v.file == "shipped"), recipe.variants[0])
        starts.append(Start(recipe, file, "again"))
    return starts


def _run(start: Start, job: Mapping[str, Any], limit_s: float, tell: Callable[[str], None]) -> None:
    """One process. Whatever prevents it is its reason."""
    try:
        python, env = python_of(start.recipe, tell), dict(environment(start.recipe))
        with tempfile.TemporaryDirectory(prefix="firstlight-") as empty:
            if start.state == "cold":
                env["FIRSTLIGHT_CACHE"] = empty
            told = {**job, "settings": dict(start.variant.settings), "started": time.time()}
            outcome = process.measure(python, start.recipe.runner, told, limit_s=limit_s, env=env)
    except (UserError, OSError) as error:
        start.failed = process.without_paths(str(error))
        return
    start.failed, start.elsewhere = outcome.failed, max(start.elsewhere, outcome.elsewhere)
    start.answers += [outcome.answer] if outcome.answer else []


def _row(start: Start) -> dict[str, Any]:
    variant, answers = start.variant, start.answers
    row: dict[str, Any] = {
        "engine": variant.peer,
        "settings": variant.shown,
        "state": start.state,
        "failed": start.failed,
    }
    if answers:
        row |= {
            "version": answers[0]["version"],
            **{key: spread([answer[key] for answer in answers]) for key in ("imported_s", "load_s", "first_token_s")},
            "rss_mb": statistics.median(answer["rss_mb"] for answer in answers),
            "elsewhere": start.elsewhere,
        }
    return row
