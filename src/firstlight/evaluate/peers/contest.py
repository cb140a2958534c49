"""Engines side by side on one machine in one run: settings swept once, the best two kept, then rounds in turn.

Every measurement is a process of its own, so each engine meets the machine alone and takes nothing down with it. In a
round each finalist runs once at every length: a drift of the machine's speed meets all of them. The exact and the
quantised finalists are chosen apart and never compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlight.evaluate.peak import limit_s
from firstlight.evaluate.peers import process
from firstlight.evaluate.peers.environments import environment, home, python_of
from firstlight.evaluate.peers.files import file_for
from firstlight.evaluate.peers.process import Outcome
from firstlight.evaluate.peers.recipes import Recipe, Variant
from firstlight.evaluate.peers.sweeps import Sweeps
from firstlight.evaluate.speed import spread
from firstlight.models.config import ModelConfig

FINALISTS = 2
QUESTIONS = (64, 96)
"""How many stretches of text, and of how many ids, every engine continues by one token for the agreement."""
_ROUND_TO = 256
TABLES = {True: "exact", False: "quantised"}


@dataclass(frozen=True)
class Task:
    """What is measured: the model's file or directory, a text in ids, prompt lengths, and how often.

    `tokens` are generated after each prompt; `limit_s` is the time that one process may take; `peaks` are the measured
    GFLOP/s by type.
    """

    path: Path
    digest: str
    config: ModelConfig
    text: Sequence[int]
    lengths: Sequence[int]
    tokens: int
    rounds: int
    threads: int
    peaks: Mapping[str, float]
    limit_s: float = 600.0
    sweep_at: int = 2048
    sweep_again: bool = False


@dataclass
class _Runs:
    """What one finalist's rounds have brought."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    elsewhere: float = 0.0


class Contest:
    """The peers of one task. `rows()` measures; what goes wrong with a peer becomes a row with its reason."""

    def __init__(
        self,
        task: Task,
        peers: Sequence[Recipe],
        tell: Callable[[str], None],
        *,
        reference: Recipe,
        converter: Recipe,
    ) -> None:
        """`reference` answers the questions in float32; `converter` is the environment that has transformers."""
        self._task, self._tell = task, tell
        self._recipes = {recipe.name: recipe for recipe in peers}
        self._reference, self._converter = reference, converter
        self._sweeps = Sweeps(home() / "sweeps.jsonl", task, self._tell)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each finalist and length, and one for everything that could not be measured."""
        finalists: list[Variant] = []
        for recipe in self._recipes.values():
            for is_exact in TABLES:
                chosen, rows = self._chosen(recipe, [v for v in recipe.variants if v.exact == is_exact])
                finalists += chosen
                yield from rows
            yield from (self._reason(recipe.name, table, why) for table, why in recipe.lacks.items())
        expected = self._expected(finalists)
        runs = self._rounds(finalists)
        for variant in finalists:
            yield from self._rows_of(variant, runs[variant.peer, variant.label, variant.exact], expected)

    def _reason(self, peer: str, table: str, why: str) -> dict[str, Any]:
        return {"engine": peer, "settings": {}, "exact": table == "exact", "prompt_tokens": None, "failed": why}

    def _chosen(self, recipe: Recipe, variants: list[Variant]) -> tuple[list[Variant], list[dict[str, Any]]]:
        """The fastest variants at the sweep's length, and rows for those that failed there."""
        if len(variants) <= FINALISTS:
            return variants, []
        seconds: dict[int, float] = {}
        rows = []
        for number, variant in enumerate(variants):
            said = self._sweeps.find(recipe, variant) or self._swept(recipe, variant, f"{number + 1}/{len(variants)}")
            if said["failed"]:
                rows.append({**_head(variant), "prompt_tokens": self._task.sweep_at, "failed": said["failed"]})
            else:
                seconds[number] = said["ttft_s"]
        return [variants[number] for number in sorted(seconds, key=seconds.__getitem__)[:FINALISTS]], rows

    def _swept(self, recipe: Recipe, variant: Variant, progress: str) -> dict[str, Any]:
        self._tell(f"sweep {progress}: {variant.peer} {variant.label}")
        outcome = self._measure(recipe, variant, [self._task.sweep_at], 1, (0, 0))
        found = (outcome.answer or {}).get("lengths", {}).get(str(self._task.sweep_at))
        # The better of two calls: one that something else on the machine disturbed must not decide.
        seconds = min(found["first_call_ttft_s"], *found["ttft_s"]) if found else None
        said = {"ttft_s": seconds, "failed": None if found else outcome.failed}
        said["elsewhere"] = outcome.elsewhere
        return self._sweeps.keep(recipe, variant, said)

    def _expected(self, finalists: Sequence[Variant]) -> list[int]:
        """What float32 answers to the questions; nothing where it can't say."""
        if not finalists:
            return []
        self._tell("the answers of float32, for the agreement")
        outcome = self._measure(self._reference, self._reference.variants[0], [], 1, QUESTIONS)
        if outcome.failed:
            self._tell(f"no agreement will be told, float32 failed: {outcome.failed}")
        answers: list[int] = (outcome.answer or {}).get("answers", [])
        return answers

    def _rounds(self, finalists: Sequence[Variant]) -> dict[tuple[str, str, bool], _Runs]:
        """All rounds; a finalist that fails in one has no part in those after it. Ctrl-C ends them early."""
        runs = {(v.peer, v.label, v.exact): _Runs() for v in finalists}
        try:
            for number in range(self._task.rounds):
                for variant in finalists:
                    self._run(variant, runs[variant.peer, variant.label, variant.exact], number)
        except KeyboardInterrupt:
            self._tell("interrupted: the rows hold what was measured until now")
            for run in runs.values():
                run.failed = run.failed or (None if run.answers else "interrupted")
        return runs

    def _run(self, variant: Variant, done: _Runs, number: int) -> None:
        """One finalist's part in one round. The questions are asked in the first."""
        if done.failed:
            return
        self._tell(f"round {number + 1}/{self._task.rounds}: {variant.peer} {variant.label}")
        recipe, asked = self._recipes[variant.peer], (0, 0) if number else QUESTIONS
        outcome = self._measure(recipe, variant, self._task.lengths, self._task.tokens, asked)
        done.failed = outcome.failed
        done.elsewhere = max(done.elsewhere, outcome.elsewhere)
        done.answers += [outcome.answer] if outcome.answer else []

    def _measure(
        self, recipe: Recipe, variant: Variant, lengths: Sequence[int], tokens: int, asked: tuple[int, int]
    ) -> Outcome:
        """One process of one variant. Whatever prevents it is the outcome's reason."""
        try:
            python = python_of(recipe, self._tell)
            file = file_for(variant.file, self._task.path, self._converter, self._tell)
            job = self._job(recipe, variant, file, lengths, tokens, asked)
            return process.measure(python, recipe.runner, job, limit_s=self._task.limit_s, env=environment(recipe))
        except Exception as error:  # a peer's trouble is a row, never the end of the run
            return Outcome(None, process.without_paths(str(error) or type(error).__name__))

    def _job(
        self,
        recipe: Recipe,
        variant: Variant,
        file: Path,
        lengths: Sequence[int],
        tokens: int,
        asked: tuple[int, int],
    ) -> dict[str, Any]:
        longest = max([*lengths, asked[1], _ROUND_TO]) + tokens
        return {
            "model": str(file),
            "settings": dict(variant.settings),
            "exact": variant.exact,
            "threads": self._task.threads,
            "max_len": min(-(-longest // _ROUND_TO) * _ROUND_TO, self._task.config.max_context),
            "text": list(self._task.text),
            "lengths": list(lengths),
            "tokens": tokens,
            "limit_s": self._task.limit_s,
            "repeat": 1,
            "questions": asked,
            "cache": str(home() / f"{recipe.name}-cache"),
        }

    def _rows_of(self, variant: Variant, runs: _Runs, expected: Sequence[int]) -> Iterator[dict[str, Any]]:
        for length in self._task.lengths:
            answers = [answer for answer in runs.answers if str(length) in answer["lengths"]]
            if answers:
                ended = {"elsewhere": runs.elsewhere, "failed": runs.failed}
                yield {**self._row(variant, length, answers, expected), **ended}
            else:
                yield {**_head(variant), "prompt_tokens": length, "failed": runs.failed}

    def _row(
        self, variant: Variant, length: int, answers: Sequence[dict[str, Any]], expected: Sequence[int]
    ) -> dict[str, Any]:
        """The rounds of one variant at one length, in the keys of `bench ttft`'s own rows and some more."""
        at = [answer["lengths"][str(length)] for answer in answers]
        ttft = spread([s for found in at for s in found["ttft_s"]])
        gaps = [s for found in at for s in found["tpot_s"]]
        tpot = spread(gaps) if gaps else None
        said = answers[-1]["exact"]
        is_exact = variant.exact if said is None else variant.exact and bool(said)
        least = limit_s(self._task.config, length, self._task.peaks[_compute_type(variant, is_exact)])
        return {
            **_head(variant),
            "version": answers[0]["version"],
            "exact": is_exact,
            "prompt_tokens": length,
            "first_call_ttft_s": statistics.median(found["first_call_ttft_s"] for found in at),
            "ttft_s": ttft,
            "prefill_tok_s": length / ttft["median"],
            "decode_tok_s": 1 / tpot["median"] if tpot else None,
            "tpot_s": tpot,
            "load_s": statistics.median(answer["load_s"] for answer in answers),
            "rss_mb": max(answer["rss_mb"] for answer in answers),
            "limit_s": least,
            "mfu": least / ttft["median"],
            "agreement": _agreement(answers[0].get("answers", []), expected),
        }


def _head(variant: Variant) -> dict[str, Any]:
    return {"engine": variant.peer, "settings": variant.shown, "exact": variant.exact}


def _compute_type(variant: Variant, is_exact: bool) -> str:
    """The type whose measured rate bounds a variant."""
    return ("f32" if variant.settings.get("precision") == "f32" else "bf16") if is_exact else "int8"


def _agreement(answers: Sequence[int], expected: Sequence[int]) -> dict[str, int] | None:
    """How many questions were answered as float32 answers them."""
    if not expected or len(answers) != len(expected):
        return None
    return {"equal": sum(a == b for a, b in zip(answers, expected)), "of": len(expected)}
