"""`--weights compact`: the same answers from the model file's own blocks, and nothing larger than these is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from firstlight import LLM, SamplingParams
from firstlight.core.errors import UserError
from firstlight.kernels.native import lib
from firstlight.models.weights.store import cache_size
from tests.tiny import save_tiny

ASKED = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)


@pytest.mark.skipif(lib is None, reason="blocks are for the compiled kernels")
def test_the_same_answers_from_less_memory(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path))
    prompts = ["A short story.", "Of all the rivers of the north " * 12]
    answers, kept = [], []
    for weights in ("compact", "default"):
        before = cache_size()
        with LLM(smollm2_path, weights=weights, max_model_len=512) as llm:
            answers.append([(out.token_ids, out.logprobs) for out in llm.generate(prompts, ASKED)])
        kept.append(cache_size() - before)
    assert answers[0] == answers[1]
    assert kept[0] <= 1.02 * smollm2_path.stat().st_size < kept[1] / 2


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no blocks of 4 to 8 bits to compute from; leave --weights out"):
        LLM(save_tiny(tmp_path), weights="compact")
