"""`bench load`: which processes are started, with what in their cache, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.evaluate.peers import starts
from firstlight.evaluate.peers.process import Outcome


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, Any], str | None]]:
    """Processes that would have been started: runner, job, and the cache folder if it is empty."""
    seen: list[tuple[str, Mapping[str, Any], str | None]] = []

    def measure(
        python: Path, runner: str, job: Mapping[str, Any], *, limit_s: float, env: Mapping[str, str]
    ) -> Outcome:
        folder = env.get("FIRSTLIGHT_CACHE")
        is_empty = folder is not None and Path(folder).is_dir() and not any(Path(folder).iterdir())
        seen.append((runner, job, folder if is_empty else None))
        if "llama" in runner:
            return Outcome(None, "crashed: SIGSEGV")
        count = len(seen)
        times = {"imported_s": count / 2, "load_s": count, "first_token_s": 2.0 * count}
        return Outcome({"version": "1", **times, "rss_mb": 100 + count}, None, 0.1)

    monkeypatch.setattr(starts.process, "measure", measure)
    monkeypatch.setattr(starts, "python_of", lambda recipe, tell: Path("python"))
    return seen


def rows(tmp_path: Path, against: list[str], repeat: int = 2) -> list[dict[str, Any]]:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x")
    how = {"threads": 2, "limit_s": 5.0, "tell": lambda line: None}
    return list(starts.measure(model, list(range(100)), Options(), against, repeat=repeat, **how))  # type: ignore[arg-type]


def test_ours_starts_cold_and_again_and_all_take_turns(begun: list[Any], tmp_path: Path) -> None:
    found = rows(tmp_path, ["transformers"])
    assert [runner for runner, _, _ in begun] == ["run_firstlight.py", "run_firstlight.py", "run_transformers.py"] * 2
    assert [cache is not None for _, _, cache in begun] == [True, False, False] * 2
    assert all(len(job["greeting"]) == starts.GREETING for _, job, _ in begun)
    assert [(row["engine"], row["state"]) for row in found] == [
        ("firstlight", "cold"),
        ("firstlight", "again"),
        ("transformers", "again"),
    ]
    assert found[0]["load_s"]["samples"] == [1, 4] and found[0]["first_token_s"]["median"] == 5.0
    assert found[0]["imported_s"]["samples"] == [0.5, 2]
    assert not any(Path(cache).exists() for _, _, cache in begun if cache), "empty caches are removed again"


def test_a_peer_that_fails_is_a_row_and_is_not_started_again(begun: list[Any], tmp_path: Path) -> None:
    found = rows(tmp_path, ["llama.cpp"], repeat=3)
    assert found[-1]["failed"] == "crashed: SIGSEGV" and "load_s" not in found[-1]
    assert sum("llama" in runner for runner, _, _ in begun) == 1 and found[1]["load_s"]["samples"] == [2, 5, 7]


def test_an_unknown_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"choose from: llama\.cpp, transformers"):
        rows(tmp_path, ["vllm"])
