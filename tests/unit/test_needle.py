"""Retrieval: samples are the same every time, as long and deep as stated; planted answerers get what they deserve."""

from __future__ import annotations

import itertools
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
from firstlight.evaluate import retrieval
from firstlight.evaluate.asking import Asked
from firstlight.evaluate.counting import CodedText
from firstlight.evaluate.haystack import Haystack, longest
from firstlight.evaluate.retrieval import PLACEMENTS, RESERVED, Conversation, Sample, Turn
from firstlight.evaluate.scores import retrieval as scores_of
from firstlight.evaluate.tasks import TASKS, Cell, Retrieval
from firstlight.prompt.tokenizer import Tokenizer
from tests.tiny import bytes_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = sorted(name for name, task in TASKS.items() if isinstance(task, Retrieval))
REPORT = {"attention": {"density": 1.0}, "methods": [], "cells": {"computed": 1, "total": 1}, "prompt_tokens": 9}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    found = Tokenizer.from_source(folder)
    found.chat_template = TEMPLATE
    return found


def sample(tokenizer: Tokenizer, name: str, length: int, index: int = 0, seed: int = 0, at: str = "last") -> Sample:
    experiment = name if at == "last" else f"{name} {at}"
    made = TASKS[name].prepare(tokenizer, Cell(experiment, length, index), seed)
    assert isinstance(made, Sample)
    return made


@settings(max_examples=15)
@given(name=st.sampled_from(NAMES), length=st.integers(3000, 6000), index=st.integers(0, 40))
def test_a_sample_is_what_it_says(tokenizer: Tokenizer, name: str, length: int, index: int) -> None:
    made = sample(tokenizer, name, length, index)
    assert made == sample(tokenizer, name, length, index)
    text = tokenizer.decode(made.ids)
    assert length * 0.6 < len(made.ids) <= length - RESERVED, "long, but not too long"
    first, second = made.turns
    assert all(value in text for turn in made.turns for value in turn.values)
    follow_up = tokenizer.decode(second.asks)
    assert text.startswith("<user>") and follow_up.startswith("</><user>")
    assert not any(value in follow_up for value in second.values), "the answer is not in the question"
    asked = text[text.rindex("<assistant>") :]
    assert name == "lost_in_the_middle" or not any(value in asked for value in first.values)


def test_ruler_has_all_its_names() -> None:
    niah = [f"niah_{kind}_{n}" for kind in ("single", "multikey") for n in (1, 2, 3)]
    names = [*niah, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert {*names, "lost_in_the_middle"} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "count"), [("niah_multivalue", 4), ("niah_multiquery", 4), ("vt", 5), ("cwe", 10), ("fwe", 3)]
)
def test_some_ask_for_several_values(tokenizer: Tokenizer, name: str, count: int) -> None:
    assert len(set(sample(tokenizer, name, 4000).turns[0].values)) == count


def test_what_is_asked_for_is_what_stands_most_often(tokenizer: Tokenizer) -> None:
    words = tokenizer.decode(sample(tokenizer, "cwe", 4000, 3).ids).partition("The list:")[2].split("\n\n")[1].split()
    counts = {word: words.count(word) for word in words if word.isalpha()}
    values = sample(tokenizer, "cwe", 4000, 3).turns[0].values
    assert set(sorted(counts, key=counts.__getitem__)[-10:]) == set(values)
    coded = CodedText(["...", "a", "b", "c", "d"], "", 0).text(300).split()
    assert [coded.count(word) for word in ("...", "a", "b", "c", "d")] == [207, 52, 23, 13, 8]


def test_a_chain_and_two_hops_can_be_followed(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(sample(tokenizer, "vt", 4000, 2).ids).partition("The text:")[2]
    names = sample(tokenizer, "vt", 4000, 2).turns[0].values
    links = [f"VAR {names[0]} = ", *(f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names))]
    assert [text.index(link) for link in links] == sorted(text.index(link) for link in links)
    made = sample(tokenizer, "qa_2", 6000, 1)
    text = tokenizer.decode(made.ids)
    keeper = text.partition("whose lighthouse ")[2].partition(" keeps")[0]
    town = text.partition(f"{keeper} keeps the lighthouse of ")[2].partition(".")[0]
    assert f"The mayor of {town} is {made.turns[0].values[0]}." in text


def test_a_long_haystack_is_full_and_needles_lie_at_their_depths(tokenizer: Tokenizer) -> None:
    depths = []
    for index in range(8):
        made = sample(tokenizer, "niah_single_2", 20000, index)
        text = tokenizer.decode(made.ids)
        assert 20000 - RESERVED - len(made.ids) < 1500
        assert made.depth is not None
        assert text.index(made.turns[0].values[0]) / len(text) == pytest.approx(made.depth, abs=0.06)
        depths.append(made.depth)
    assert max(b - a for a, b in zip(sorted(depths), sorted(depths)[1:])) < 0.3


def test_the_question_stands_where_it_should(tokenizer: Tokenizer) -> None:
    texts, made = {}, {at: sample(tokenizer, "niah_single_2", 6000, 4, at=at) for at in PLACEMENTS}
    for at, one in made.items():
        texts[at] = tokenizer.decode(one.ids)
        assert one.turns[0].values == made["last"].turns[0].values and one.turns[0].at == at
        assert len(one.ids) <= 6000 - RESERVED and texts[at].count("What is the secret") == 1
    value = made["last"].turns[0].values[0]
    where = {at: (text.index("What is the secret"), text.index(value), len(text)) for at, text in texts.items()}
    assert where["first"][0] < where["first"][1] and texts["first"].endswith("<assistant>The answer is")
    assert where["last"][1] < where["last"][0] and where["tail"][1] < where["tail"][0]
    assert where["tail"][0] - where["tail"][1] >= retrieval.TAIL * 0.8, "nothing asked for is near the question"
    assert [len(one.turns) for one in made.values()] == [2, 1, 1]


def test_another_seed_task_length_or_number_is_another_sample(tokenizer: Tokenizer) -> None:
    choices = [("niah_single_1", 2000, 0, 0), ("niah_single_2", 2000, 0, 0), ("niah_single_1", 2001, 0, 0)]
    choices += [("niah_single_1", 2000, 1, 0), ("niah_single_1", 2000, 0, 1), ("niah_single_3", 2000, 0, 0)]
    assert len({sample(tokenizer, *choice).turns[0].values for choice in choices}) == len(choices)


def test_noise_is_one_line_over_and_over(tokenizer: Tokenizer) -> None:
    lines = tokenizer.decode(sample(tokenizer, "niah_single_1", 6000, 3).ids).split("\n")
    assert max(lines.count(line) for line in lines) > 10
    lines = tokenizer.decode(sample(tokenizer, "niah_single_2", 6000, 3).ids).split("\n")
    assert all(lines.count(line) == 1 for line in lines if line)


@given(st.integers(0, 500), st.integers(1, 9))
def test_the_longest_is_the_longest(limit: int, unit: int) -> None:
    assert longest(lambda n: n, lambda n: unit * n, limit) == limit // unit
    assert longest(lambda n: n, lambda n: limit + 1, limit) is None
    assert Haystack([" a"], [(0.5, " needle")]).text(4) == "a a needle a a"


def test_a_length_without_room_is_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="300 tokens are too few for this task; give more --lengths"):
        sample(tokenizer, "niah_single_1", 300)


def test_a_model_without_a_chat_template_continues_a_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    made = sample(tokenizer, "niah_single_1", 2000)
    assert tokenizer.decode(made.ids).endswith("in the text is")
    assert tokenizer.decode(made.turns[1].asks).startswith("\n\nFrom which platform")


def answering(tokenizer: Tokenizer, says: Callable[[Sample], tuple[str, str]]) -> Callable[..., Any]:
    """In the place of the engine: a model that says these two answers, and byte 0 for the end."""

    def ask(engine: Any, prompt: PromptIds, choose: Any, num_tokens: int) -> Asked:
        first, second = ([*tokenizer.encode(text), 0] for text in says(engine.sample))
        ignored = [1] * (len(engine.sample.turns[1].asks) - 1)  # while the question is put, nobody listens to it
        said = [*first, *ignored, *second, *[1] * num_tokens]
        generated: list[int] = []
        for token in said[:num_tokens]:
            generated.append(choose(list(generated), torch.nn.functional.one_hot(torch.tensor(token), 256).float()))
        return Asked(generated, REPORT, 0.1)

    return ask


@pytest.mark.parametrize(
    ("says", "scores"),
    [
        (lambda a, b: (f" {a}.", f" {b}."), (1.0, 1.0)),
        (lambda a, b: (" 1234567.", " 1000."), (0.0, 0.0)),
        (lambda a, b: (f" {a}.", f" {a}."), (1.0, 0.0)),
        (lambda a, b: (f" {b}.", f" {b}."), (0.0, 1.0)),
    ],
)
def test_planted_answers_get_the_scores_they_deserve(
    says: Any, scores: tuple[float, float], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "ask", answering(tokenizer, lambda s: says(*(t.values[0] for t in s.turns))))
    records = []
    for index in range(12):
        made = sample(tokenizer, "niah_single_1", 2000, index)
        made = Sample(made.prompt, made.turns, frozenset({0}), made.depth)
        records.append(retrieval.measure(SimpleNamespace(sample=made), tokenizer, made))  # type: ignore[arg-type]
    assert tuple(row["score"] for row in scores_of(records, None)) == scores


def test_an_answer_is_worth_the_share_of_its_values() -> None:
    assert retrieval.share_of(("12", "34", "AB", "x"), "34, and ab; 1 2") == 0.5


def test_an_answer_without_an_end_is_cut_and_the_second_question_comes_anyway() -> None:
    turns = (Turn("last", [], ("a",), 4), Turn("second", [7, 8, 9], ("b",), 4))
    made = Sample(PromptIds([1]), turns, frozenset({0}), 0.5)
    talk = Conversation(made)
    logits = torch.zeros(16)
    logits[5] = 1.0
    generated: list[int] = []
    for _ in range(made.num_generated):
        generated.append(talk.choose(list(generated), logits))
    assert generated == [5, 5, 5, 5, 7, 8, 9, 5, 5, 5, 5]
    assert talk.answers(generated) == [[5] * 4, [5] * 4]
