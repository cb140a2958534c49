"""Needles: the same every time, of the stated length, at the stated depth; planted answerers get what they deserve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.evaluate import needle
from firstlight.evaluate.asking import Asked
from firstlight.evaluate.scores import retrieval
from firstlight.prompt.tokenizer import Tokenizer
from tests.tiny import bytes_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
tasks = st.sampled_from(sorted(needle.KINDS))
REPORT = {"attention": {"density": 1.0}, "methods": []}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    found = Tokenizer.from_source(folder)
    found.chat_template = TEMPLATE
    return found


@settings(max_examples=10)
@given(task=tasks, length=st.integers(800, 6000), index=st.integers(0, 40))
def test_a_sample_is_what_it_says(tokenizer: Tokenizer, task: str, length: int, index: int) -> None:
    made = needle.sample(tokenizer, task, length, index, 0)
    assert made == needle.sample(tokenizer, task, length, index, 0)
    text = tokenizer.decode(made.ids)
    assert len(made.ids) <= length - needle.RESERVED
    assert all(text.count(value) == 1 for value in made.values)
    assert text.startswith("<user>") and text.rindex("What is the secret") > max(map(text.index, made.values))
    follow_up = tokenizer.decode(made.follow_up)
    assert follow_up.startswith("</><user>From which") and not any(value in follow_up for value in made.values)


def test_a_long_haystack_is_full_and_needles_lie_at_their_depths(tokenizer: Tokenizer) -> None:
    depths = []
    for index in range(16):
        made = needle.sample(tokenizer, "niah_single_2", 30000, index, 0)
        text = tokenizer.decode(made.ids)
        assert 30000 - needle.RESERVED - len(made.ids) < 1500
        assert text.index(made.values[0]) / len(text) == pytest.approx(made.depth, abs=0.06)
        depths.append(made.depth)
    assert max(b - a for a, b in zip(sorted(depths), sorted(depths)[1:])) < 0.2


def test_another_seed_task_length_or_number_is_another_sample(tokenizer: Tokenizer) -> None:
    choices = [("niah_single_1", 2000, 0, 0), ("niah_single_2", 2000, 0, 0), ("niah_single_1", 2001, 0, 0)]
    choices += [("niah_single_1", 2000, 1, 0), ("niah_single_1", 2000, 0, 1), ("niah_single_3", 2000, 0, 0)]
    assert len({needle.sample(tokenizer, *choice).values for choice in choices}) == len(choices)


def test_noise_is_one_line_over_and_over(tokenizer: Tokenizer) -> None:
    lines = tokenizer.decode(needle.sample(tokenizer, "niah_single_1", 6000, 3, 0).ids).split("\n")
    assert max(lines.count(line) for line in lines) > 10
    lines = tokenizer.decode(needle.sample(tokenizer, "niah_single_2", 6000, 3, 0).ids).split("\n")
    assert all(lines.count(line) == 1 for line in lines if line)


def test_a_length_without_room_is_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="300 tokens are too few for a haystack; give more --lengths"):
        needle.sample(tokenizer, "niah_single_1", 300, 0, 0)


def test_a_model_without_a_chat_template_continues_a_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    made = needle.sample(tokenizer, "niah_single_1", 2000, 0, 0)
    assert tokenizer.decode(made.ids).endswith("in the text is")
    assert tokenizer.decode(made.follow_up).startswith("\n\nFrom which platform")


def answering(tokenizer: Tokenizer, says: Callable[[needle.Sample], tuple[str, str]]) -> Callable[..., Any]:
    """In the place of the engine: a model that says these two answers, and byte 0 for the end."""

    def ask(engine: Any, prompt: PromptIds, choose: Any, num_tokens: int) -> Asked:
        first, second = ([*tokenizer.encode(text), 0] for text in says(engine.sample))
        ignored = [1] * (len(engine.sample.follow_up) - 1)  # while the question is put, nobody listens to it
        said = [*first, *ignored, *second, *[1] * num_tokens]
        generated: list[int] = []
        for token in said[:num_tokens]:
            generated.append(choose(list(generated), torch.nn.functional.one_hot(torch.tensor(token), 256).float()))
        return Asked(generated, REPORT, 0.1)

    return ask


@pytest.mark.parametrize(
    ("says", "scores"),
    [
        (lambda s: (f" {s.values[0]}.", f" {s.values[1]}."), (1.0, 1.0)),
        (lambda s: (" 1234567.", " 1000."), (0.0, 0.0)),
        (lambda s: (f" {s.values[0]}.", f" {s.values[0]}."), (1.0, 0.0)),
        (lambda s: (f" {s.values[1]}.", f" {s.values[1]}."), (0.0, 1.0)),
    ],
)
def test_planted_answers_get_the_scores_they_deserve(
    says: Any, scores: tuple[float, float], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle, "ask", answering(tokenizer, says))
    records = []
    for index in range(12):
        made = needle.sample(tokenizer, "niah_single_1", 2000, index, 0)
        made = needle.Sample(made.prompt, made.follow_up, frozenset({0}), made.values, made.depth, made.num_answer)
        records.append(needle.measure(SimpleNamespace(sample=made), tokenizer, made))  # type: ignore[arg-type]
    assert tuple(row["score"] for row in retrieval(records, None)) == scores


def test_an_answer_without_an_end_is_cut_and_the_second_question_comes_anyway() -> None:
    sample = needle.Sample(PromptIds([1]), [7, 8, 9], frozenset({0}), ("a", "b"), 0.5, 4)
    talk = needle.Conversation(sample)
    logits = torch.zeros(16)
    logits[5] = 1.0
    generated: list[int] = []
    for _ in range(talk.num_tokens):
        generated.append(talk.choose(list(generated), logits))
    assert generated == [5, 5, 5, 5, 7, 8, 9, 5, 5, 5, 5]
    assert talk.answers(generated) == ([5] * 4, [5] * 4)
