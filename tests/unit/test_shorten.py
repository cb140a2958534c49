"""Prompt compressors on made-up surprisals: the budget, what is protected, and each method beside a plain version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts, PromptEdit, PromptEditor, PromptIds
from firstlight.core.registry import Method, make_parts, recipe
from firstlight.prompt import bm25
from firstlight.prompt.shorten import Budget, shares

FACTS = ModelFacts("sha", 8, 4, 2, 16, (None,) * 8)
METHODS = ("llmlingua", "truncate", "bm25")


class Surprise:
    """In the place of a model: a token is as surprising as its number says, modulo some; notes what it was asked."""

    def __init__(self, modulus: int = 7) -> None:
        self.modulus = modulus
        self.calls: list[tuple[list[int], int, Any, Any]] = []

    def nll(
        self, ids: Sequence[int], *, first: int = 0, layers: int | None = None, among: Sequence[int] | None = None
    ) -> list[float]:
        self.calls.append((list(ids), first, layers, among))
        return [float(i * 31 % self.modulus) for i in ids[first:]]


def editor(method: str, **settings: Any) -> PromptEditor:
    (part,) = make_parts([Method(method, **settings)], FACTS)
    impl: PromptEditor = part.impl
    return impl


def words(ids: Sequence[int]) -> str:
    """A token is a word; every ninth ends a sentence."""
    return " ".join(f"w{i % 50}{'.' * (i % 9 == 0)}" for i in ids)


@st.composite
def prompts(draw: st.DrawFn) -> PromptIds:
    """Texts of the context between protected tokens."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), min_size=1, max_size=4))
    spans, at = [], 0
    for gap, length in lengths:
        spans.append((at + gap, at + gap + length))
        at += gap + length
    ids = draw(st.lists(st.integers(0, 400), min_size=at, max_size=at + 5))
    return PromptIds(ids, spans, "w3 and w7?", words)


@pytest.mark.parametrize("method", METHODS)
@given(prompt=prompts(), rate=st.floats(0.02, 1.0), modulus=st.integers(1, 9))
def test_what_stays_is_a_subsequence_with_everything_protected_at_the_rate_that_was_asked_for(
    method: str, prompt: PromptIds, rate: float, modulus: int
) -> None:
    edit = editor(method, rate=rate).edit(prompt, Surprise(modulus))
    assert list(edit.keep_map) == sorted(set(edit.keep_map))
    assert list(edit.ids) == [prompt.ids[i] for i in edit.keep_map]
    free = {i for lo, hi in prompt.context for i in range(lo, hi)}
    protected = [i for lo, hi in edit.protected for i in list(edit.keep_map)[lo:hi]]
    assert protected == [i for i in range(len(prompt.ids)) if i not in free]
    kept = len(edit.ids) - len(protected)
    # half a token off at most, but for first tokens of segments, which llmlingua always keeps
    segments = sum(-(-(hi - lo) // 200) for lo, hi in prompt.context) if method == "llmlingua" else 0
    assert -0.5 <= kept - rate * len(free) <= 0.5 + segments
    assert edit == editor(method, rate=rate).edit(prompt, Surprise(modulus))


@pytest.mark.parametrize("method", METHODS)
@given(prompt=prompts())
def test_rate_one_keeps_every_id(method: str, prompt: PromptIds) -> None:
    edit = editor(method, rate=1.0).edit(prompt, Surprise())
    assert list(edit.ids) == list(prompt.ids) and list(edit.keep_map) == list(range(len(prompt.ids)))


@pytest.mark.parametrize("method", METHODS)
@given(prompt=prompts(), target=st.integers(1, 2000))
def test_a_target_is_kept_to(method: str, prompt: PromptIds, target: int) -> None:
    edit = editor(method, target_token=target).edit(prompt, Surprise())
    free = sum(hi - lo for lo, hi in prompt.context)
    kept = len(edit.ids) - (len(prompt.ids) - free)
    segments = sum(-(-(hi - lo) // 200) for lo, hi in prompt.context)
    assert min(target, free) <= kept <= min(target, free) + (segments if method == "llmlingua" else 0)


def plain_llmlingua(ids: Sequence[int], count: int, modulus: int, segment: int) -> list[int]:
    """The card's loop, with ranks in the place of a quantile."""
    kept: list[int] = []
    for lo in range(0, len(ids), segment):
        part = ids[lo : lo + segment]
        upto = math.floor(count * (lo + len(part)) / len(ids) + 0.5)
        room = upto - math.floor(count * lo / len(ids) + 0.5)
        nll = [math.inf, *(float(i * 31 % modulus) for i in part[1:])]
        beaten_by = [sum((b, -j) > (a, -i) for j, b in enumerate(nll)) for i, a in enumerate(nll)]
        kept += [lo + i for i in range(len(part)) if i == 0 or beaten_by[i] < room]
    return kept


@given(
    ids=st.lists(st.integers(0, 400), min_size=1, max_size=120),
    rate=st.floats(0.05, 0.99),
    modulus=st.integers(1, 9),
    segment=st.integers(1, 50),
)
def test_llmlingua_keeps_what_the_plain_loop_keeps(ids: list[int], rate: float, modulus: int, segment: int) -> None:
    (count,) = shares([len(ids)], rate)
    prompt = PromptIds(ids, [(0, len(ids))], "", words)
    edit = editor("llmlingua", rate=rate, segment=segment).edit(prompt, Surprise(modulus))
    expected = plain_llmlingua(ids, count, modulus, segment) if count not in (0, len(ids)) else list(range(count))
    assert list(edit.keep_map) == expected


def test_llmlingua_asks_for_each_segment_after_what_stayed_of_those_before() -> None:
    ids, scorer = list(range(500)), Surprise()
    edit = editor("llmlingua").edit(PromptIds(ids, [(0, 500)], "", words), scorer)
    kept = list(edit.keep_map)
    for n, (asked, first, layers, among) in enumerate(scorer.calls):
        before = [i for i in kept if i < 200 * n]
        assert (asked, first, layers, among) == ([*before, *ids[200 * n : 200 * n + 200]], len(before), 6, ids)
    assert len(scorer.calls) == 3 and {0, 200, 400} <= set(kept)


def test_digits_go_last_if_asked_for() -> None:
    ids = [*range(100, 200), 7, 8, 9]
    prompt = PromptIds(ids, [(0, 103)], "", lambda some: " ".join(str(i) if i < 10 else "x" for i in some))
    assert not {7, 8, 9} & set(editor("llmlingua", rate=0.1).edit(prompt, Surprise(3)).ids)
    kept = editor("llmlingua", rate=0.1, digits=True).edit(prompt, Surprise(3)).ids
    assert {100, 7, 8, 9} <= set(kept) and len(kept) == 10


def test_the_whole_model_scores_among_all_tokens() -> None:
    scorer = Surprise()
    editor("llmlingua", layers="all").edit(PromptIds(list(range(9)), [(0, 9)]), scorer)
    assert scorer.calls[0][2:] == (None, None)
    with pytest.raises(UserError, match="layers=9: the model has 8; give as many at most, or all"):
        editor("llmlingua", layers=9)
    small = replace(FACTS, num_layers=2)
    assert make_parts([Method("llmlingua")], small)[0].impl._layers is None


@given(ids=st.lists(st.integers(0, 400), min_size=1, max_size=300), size=st.integers(1, 40))
def test_passages_are_the_whole_text_in_pieces_that_are_not_too_long(ids: list[int], size: int) -> None:
    found = bm25.passages(ids, size, words)
    assert [i for lo, hi in found for i in range(lo, hi)] == list(range(len(ids)))
    assert all(0 < hi - lo <= size for lo, hi in found)
    for lo, hi in found[:-1]:
        second_half = [ids[i] % 9 == 0 for i in range(lo + size // 2, lo + size)]
        assert (ids[hi - 1] % 9 == 0) or not any(second_half)


def test_bm25_by_hand() -> None:
    documents = [["a", "b", "a"], ["b", "c"], ["c", "c", "c", "d"]]
    mean, idf = 3.0, math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / mean))
    assert bm25.scores(documents, ["a", "z"]) == pytest.approx([expected, 0.0, 0.0])
    assert bm25.scores([], ["a"]) == [] and bm25.scores([["a"]], []) == [0.0]
    assert bm25.words("Grüße, 3.5 — 東京タワー don't") == ["grüße", "3", "5", *"東京タワー", "don", "t"]


def test_bm25_keeps_the_passage_that_answers_wherever_it_is_and_wants_a_question() -> None:
    ids = [*range(1000, 1100), 7, *range(2000, 2099), *range(3000, 3100)]
    text = {7: "platypus"}
    prompt = PromptIds(ids, [(0, 300)], "where is the Platypus?", lambda some: " ".join(text.get(i, "x") for i in some))
    assert list(editor("bm25", target_token=100).edit(prompt, Surprise()).ids) == ids[100:200]
    with pytest.raises(UserError, match="bm25 ranks by a question, and a document is prefilled before one is known"):
        editor("bm25").edit(replace(prompt, question=None), Surprise())


def test_truncate_keeps_the_end_of_each_text() -> None:
    prompt = PromptIds(list(range(20)), [(2, 8), (10, 20)])
    assert list(editor("truncate").edit(prompt, Surprise()).ids) == [0, 1, 5, 6, 7, 8, 9, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("method", METHODS)
def test_one_token_stays_or_goes_and_all_equal_surprise_is_no_harm(method: str) -> None:
    edit = editor(method).edit(PromptIds([5, 6, 7], [(1, 2)], "w6", words), Surprise(1))
    assert list(edit.ids) == [5, 6, 7]
    edit = editor(method).edit(PromptIds([5] * 400, [(0, 400)], "w6", words), Surprise(1))
    assert len(edit.ids) == 200


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rate": 0}, "rate=0 is out of range; give more than 0 and at most 1"),
        ({"rate": 1.5}, "rate=1.5 is out of range"),
        ({"rate": "nan"}, "rate=nan is out of range"),
        ({"target_token": 0}, "target_token=0 is out of range; give 1 or more"),
        ({"layers": "some"}, "layers='some' is out of range; give 1 or more, or all"),
        ({"segment": 0}, "segment=0 is out of range"),
        ({"depth": 1}, "llmlingua has no setting 'depth'"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        editor("llmlingua", **settings)


def test_two_compressors_exclude_each_other_and_documents_carry_theirs() -> None:
    with pytest.raises(UserError, match="llmlingua and truncate can't work together: both choose the prompt's tokens"):
        make_parts([Method("llmlingua"), Method("truncate")])
    assert recipe(make_parts([Method("truncate")])) != recipe(make_parts([Method("truncate", rate=0.4)])) != ""


def test_an_editor_that_overrides_nothing_leaves_the_prompt() -> None:
    assert PromptEditor().edit(PromptIds([1, 2]), Surprise()) == PromptEdit([1, 2], range(2), [(0, 2)])


@given(lengths=st.lists(st.integers(0, 50), max_size=6), rate=st.floats(0.01, 1.0), more=st.integers(0, 50))
def test_what_stays_of_a_text_does_not_depend_on_later_ones(lengths: list[int], rate: float, more: int) -> None:
    assert Budget(rate).counts([*lengths, more])[: len(lengths)] == Budget(rate).counts(lengths)
