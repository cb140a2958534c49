"""`bench throughput` on the tiny model: who is under way at once, what is counted, and that it sums."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.engine.editing import Editing
from firstlight.evaluate.throughput import measure
from tests.tiny import VOCABULARY, tiny_engine


class Watched:
    """A stand-in for `LLM` over the tiny engine that writes down who was under way."""

    def __init__(self, **options: Any) -> None:
        self.options = Options(prefix_cache="off", **options)
        self.engine = tiny_engine(prefix_cache="off", **options)
        self.answers = SimpleNamespace(editing=Editing(self.engine.parts, self.engine.machine.model))
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
        self.prompts: list[list[int]] = []
        self.most = 0
        self._add, self._step = self.engine.add, self.engine.step
        self.engine.add, self.engine.step = self.add, self.step  # type: ignore[method-assign]

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]

    def add(self, request: Any) -> Any:
        self.prompts.append(list(request.prompt_ids))
        return self._add(request)

    def step(self) -> Any:
        self.most = max(self.most, sum(not live.finish_reason for live in self.engine._lives.values()))
        return self._step()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=2), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_rows_are_what_was_asked_for(batches: list[int], lengths: list[int]) -> None:
    llm = Watched(max_model_len=64)
    rows = []
    for row in measure(llm, batches, lengths, num_new=3, repeat=1):  # type: ignore[arg-type]
        assert llm.most == row["batch"]
        assert sorted(map(len, llm.prompts)) == sorted(row["prompt_tokens"] * 2)  # warm-up and one repeat
        firsts = {tuple(prompt[:8]) for prompt in llm.prompts if len(prompt) >= 8}
        assert len(firsts) == sum(length >= 8 for length in row["prompt_tokens"])
        llm.most, llm.prompts = 0, []
        rows.append(row)
    assert [row["batch"] for row in rows] == list(dict.fromkeys([1, *batches]))
    assert rows[0]["gain"] == 1.0
    for row in rows:
        assert row["requests"] == math.ceil(row["batch"] / len(lengths)) * len(lengths)
        assert {row["prompt_tokens"].count(n) for n in set(lengths)} <= {
            row["requests"] // len(lengths) * lengths.count(n) for n in set(lengths)
        }
        assert row["new_tokens"] == 3 and min(row["prefill_tok_s"], row["decode_tok_s"]) > 0
        all_tokens = sum(row["prompt_tokens"]) + 3 * row["requests"]
        assert row["total_tok_s"] * row["wall_s"]["median"] == pytest.approx(all_tokens)
    assert not llm.engine.has_work


def test_a_method_makes_the_rows_approximate() -> None:
    llm = Watched(method=["band:sink=4,window=8"], max_model_len=64)
    (row,) = measure(llm, [1], [32], num_new=2, repeat=1)  # type: ignore[arg-type]
    assert row["exact"] is False


@pytest.mark.parametrize(
    ("batches", "lengths", "num_new", "repeat"),
    [([], [8], 2, 1), ([0], [8], 2, 1), ([1], [], 2, 1), ([1], [0], 2, 1), ([1], [8], 1, 1), ([1], [8], 2, 0)],
)
def test_sizes_that_cannot_be(batches: list[int], lengths: list[int], num_new: int, repeat: int) -> None:
    with pytest.raises(UserError, match="; give"):
        list(measure(Watched(), batches, lengths, num_new=num_new, repeat=repeat))  # type: ignore[arg-type]
