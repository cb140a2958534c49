"""Formulas and intervals of `firstlight eval` against plain numpy, and scores of planted records."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.evaluate import distance
from firstlight.evaluate.intervals import resampled, sign_test, wilson
from firstlight.evaluate.scores import agreement, context_gain, difference, perplexity, retrieval, together

seeds = st.integers(0, 10**6)


def pair(seed: int, rows: int = 5, vocabulary: int = 300, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a reference and of something near it."""
    g = torch.Generator().manual_seed(seed)
    one = torch.randn(rows, vocabulary, generator=g) * 4
    return one, one + torch.randn(rows, vocabulary, generator=g) * noise


def softmax(logits: torch.Tensor) -> np.ndarray:
    p = np.exp(logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@given(seeds)
def test_divergence_is_the_sum_over_the_vocabulary(seed: int) -> None:
    one, other = pair(seed)
    p, q = softmax(one), softmax(other)
    found = distance.divergence(distance.outline(one), other)
    assert np.allclose(found, (p * (np.log(p) - np.log(q))).sum(-1), atol=1e-5)
    assert (distance.same_top(distance.outline(one), other).numpy() == (p.argmax(-1) == q.argmax(-1))).all()


@settings(max_examples=20)
@given(seeds)
def test_an_outline_lumps_the_unlikely_and_only_loses(seed: int) -> None:
    one, other = pair(seed, vocabulary=distance.LIKELIEST + 500)
    p, q = softmax(one), softmax(other)
    found = distance.divergence(distance.outline(one), other).numpy()
    for row in range(len(p)):
        order = np.argsort(-p[row], kind="stable")
        named, rest = order[: distance.LIKELIEST], order[distance.LIKELIEST :]
        want = (p[row][named] * np.log(p[row][named] / q[row][named])).sum()
        want += p[row][rest].sum() * np.log(p[row][rest].sum() / q[row][rest].sum())
        whole = (p[row] * np.log(p[row] / q[row])).sum()
        assert math.isclose(found[row], want, abs_tol=1e-5)
        assert -1e-6 <= found[row] <= whole + 1e-5


@given(seeds)
def test_divergence_of_a_thing_from_itself_is_nothing(seed: int) -> None:
    one, _ = pair(seed, vocabulary=distance.LIKELIEST + 9)
    assert distance.divergence(distance.outline(one), one).abs().max() < 1e-6


@given(seeds)
def test_surprise(seed: int) -> None:
    logits, _ = pair(seed)
    labels = torch.randint(300, (5,), generator=torch.Generator().manual_seed(seed))
    assert np.allclose(distance.surprise(logits, labels), -np.log(softmax(logits)[np.arange(5), labels.numpy()]))


def test_wilson_at_known_values() -> None:
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(45, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)


def test_the_bootstrap_is_the_normal_interval_of_many_clusters_and_always_the_same() -> None:
    rng = np.random.default_rng(3)
    clusters = np.stack([np.ones(400), rng.normal(2.0, 1.0, 400)], axis=1)
    mean = lambda sums: sums[..., 1] / sums[..., 0]  # noqa: E731
    low, high = resampled(clusters, mean)
    error = clusters[:, 1].std() / math.sqrt(400)
    centre = clusters[:, 1].mean()
    assert (low, high) == pytest.approx((centre - 1.96 * error, centre + 1.96 * error), abs=0.02)
    assert resampled(clusters, mean) == (low, high)


def test_pairs_see_what_two_intervals_hide() -> None:
    """A small loss in every cluster, hidden by large differences between clusters."""
    rng = np.random.default_rng(4)
    dense = np.stack([np.full(48, 64.0), rng.normal(160, 40, 48)], axis=1)
    worse = dense + np.array([0, 1])
    mean = lambda sums: sums[..., 1] / sums[..., 0]  # noqa: E731
    paired = difference(worse, dense, mean)
    assert paired is not None
    assert paired["low"] > 0 and paired["difference"] == pytest.approx(1 / 64)
    assert resampled(worse, mean)[0] < resampled(dense, mean)[1]
    assert difference(worse[:40], dense, mean) is None


def window(first: int, rows: int, kl: float, top1: float, nll: float, own: float, cut: float | None) -> dict:
    """Sums from means."""
    means = {"kl": kl, "top1": top1, "nll": nll, "nll_reference": own}
    sums = {key: value * rows for key, value in means.items()}
    return {"first": first, "rows": rows, **sums, "nll_truncated": None if cut is None else cut * rows}


def reading(book: str, nll: float, own: float, cut: float, kl: float = 0.1, top1: float = 0.9) -> dict:
    """A record with one window that has no truncated reader, and four that have."""
    windows = [window(0, 64, kl, top1, 9.0, 9.0, None)]
    windows += [window(1000 * i, 64, kl, top1, nll, own, cut) for i in range(1, 5)]
    return {
        "book": book,
        "prompt": windows,
        "probe_rows": [],
        "continuation": [window(9000, 16, 1.0, 0.5, nll, own, cut)],
    }


def test_agreement_of_planted_records() -> None:
    prompt, continuation = agreement([reading("a", 2.0, 2.0, 3.0), reading("b", 2.0, 2.0, 3.0, kl=0.3, top1=0.7)], None)
    assert (prompt["at"], continuation["at"]) == ("prompt", "continuation")
    assert prompt["score"] == prompt["top1"] == pytest.approx(0.8) and prompt["kl"] == pytest.approx(0.2)
    assert prompt["low"] < 0.8 < prompt["high"] and prompt["samples"] == 640 and prompt["clusters"] == 10
    assert continuation["score"] == pytest.approx(0.5) and continuation["against_dense"] is None


def test_perplexity_and_context_gain_of_planted_records() -> None:
    exact = [reading(book, 2.0, 2.0, 2.3) for book in "abc"]
    window_only = [reading(book, 2.3, 2.0, 2.3) for book in "abc"]
    half = [reading("a", math.log((math.exp(2.0) + math.exp(2.3)) / 2), 2.0, 2.3)]
    for records, gain in [(exact, 1.0), (window_only, 0.0), (half, 0.5)]:
        row = perplexity(records, exact[: len(records)])[0]
        assert row["gain_kept"] == pytest.approx(gain) and row["gain_texts"] == len(records)
    mean = (9.0 + 4 * 2.3) / 5
    row = perplexity(window_only, exact)[0]
    assert row["score"] == pytest.approx(math.exp(mean))
    assert row["reference"] == pytest.approx(math.exp((9 + 8) / 5))
    assert row["against_dense"]["difference"] == pytest.approx(math.exp(mean) - math.exp((9 + 8) / 5))
    assert [text["truncated_ratio"] for text in row["texts"]] == pytest.approx([math.exp(0.3)] * 3)


def test_no_gain_where_the_context_gives_nothing() -> None:
    row = perplexity([reading("a", 2.0, 2.0, 2.0 + math.log(1.04)), reading("b", 2.1, 2.0, 2.2)], None)[0]
    assert row["gain_texts"] == 1
    row = perplexity([reading("a", 2.0, 2.0, 2.01)], None)[0]
    assert row["gain_texts"] == 0 and math.isnan(row["gain_kept"])


def answers(right: str) -> list[dict]:
    return [{"depth": i / len(right), "last": mark == "+", "second": True} for i, mark in enumerate(right)]


def test_retrieval_is_paired_with_dense_and_says_na_where_dense_fails() -> None:
    row = retrieval(answers("+++++-++++"), answers("++++++++-+"))[0]
    assert row["score"] == 0.9 and row["samples"] == 10
    assert row["against_dense"]["difference"] == 0 and (row["against_dense"]["won"], row["against_dense"]["lost"]) == (
        1,
        1,
    )
    row = retrieval(answers("++++++++++"), answers("++++++++--"))[0]
    assert row["score"] is None and row["low"] is None and row["note"] == "n/a: dense finds 8 of 10"
    assert retrieval(answers("++--"), None)[0]["score"] == 0.5


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_sign_test_is_the_binomial_one(won: int, lost: int) -> None:
    p = sign_test(won, lost)
    flips = np.random.default_rng(0).binomial(won + lost, 0.5, 20000)
    as_uneven = np.minimum(flips, won + lost - flips) <= min(won, lost)
    assert p == sign_test(lost, won) and p == pytest.approx(as_uneven.mean(), abs=0.02)
    assert sign_test(0, 0) == 1 and sign_test(0, 6) == pytest.approx(2 / 64)


def test_wins_and_losses_of_all_retrieval_add_up_without_what_dense_cannot_do() -> None:
    dense = answers("+" * 10)
    kept = [row | {"name": "m", "length": 9} for row in retrieval(answers("-+++++++++"), dense)]
    failed = retrieval(answers("-" * 10), answers("+" * 8 + "--"))[:1]
    base = [row | {"name": "dense", "length": 9} for row in retrieval(dense, None)]
    (line,) = together([*kept, *(row | {"name": "m", "length": 9} for row in failed), *base])
    assert (line["samples"], line["won"], line["lost"], line["net"], line["equal"]) == (20, 0, 1, -1, 19)
    assert line["p"] == 1.0 and line["rows"] == 2
    useless = retrieval(answers("-" * 10), dense)[0]
    assert useless["score"] == 0 and useless["against_dense"]["net"] == -10 and useless["against_dense"]["p"] < 0.01


def test_depths_are_fifths_of_the_text() -> None:
    last, second = retrieval(answers("++--++++-+"), None)
    assert [part["score"] for part in last["depths"]] == [1.0, 0.0, 1.0, 1.0, 0.5]
    assert [part["samples"] for part in last["depths"]] == [2] * 5 and second["depths"] is None
    scattered = [record | {"depth": None} for record in answers("++")]
    assert retrieval(scattered, None)[0]["depths"] is None


def test_answers_may_be_right_in_part_and_placements_have_rows_of_their_own() -> None:
    records = [
        {"depth": None, "last": 0.25, "second": 1.0},
        {"depth": None, "first": 0.5},
        {"depth": None, "tail": 1.0},
    ]
    rows = retrieval(records, None)
    assert [(row["at"], row["score"], row["samples"]) for row in rows] == [
        ("last", 0.25, 1),
        ("first", 0.5, 1),
        ("tail", 1.0, 1),
        ("second", 1.0, 1),
    ]


def test_context_gain_is_one_for_dense_none_for_a_window_and_na_where_there_is_none() -> None:
    exact, window_only = ([reading(book, nll, 2.0, 2.3) for book in "abc"] for nll in (2.0, 2.3))
    row = context_gain(window_only, exact)[0]
    assert row["score"] == pytest.approx(0, abs=1e-9) and row["low"] <= 0 <= row["high"]
    assert row["against_dense"]["difference"] == pytest.approx(-1.0) and row["samples"] == 3 * 4 * 64
    assert context_gain(exact, None)[0]["score"] == pytest.approx(1.0)
    assert context_gain([reading("a", 2.0, 2.0, 2.01)], None)[0]["note"].startswith("n/a")


def test_a_method_that_leaves_rows_out_is_not_paired() -> None:
    dense = [reading("a", 2.0, 2.0, 2.3)]
    fewer = [reading("a", 2.0, 2.0, 2.3)]
    fewer[0]["prompt"][0] |= {"rows": 0}
    row = agreement(fewer, dense)[0]
    assert row["clusters"] == 4 and row["against_dense"] is None
    nothing = [reading("a", 2.0, 2.0, 2.3)]
    for one in nothing[0]["prompt"]:
        one["rows"] = 0
    row = agreement(nothing, dense)[0]
    assert row["samples"] == 0 and math.isnan(row["score"])


@settings(max_examples=10)
@given(seeds)
def test_intervals_hold_the_estimate(seed: int) -> None:
    rng = random.Random(seed)
    records = [reading("a", rng.uniform(1, 3), 2.0, 2.5, rng.random(), rng.random()) for _ in range(3)]
    for row in [*agreement(records, None), *perplexity(records, None)]:
        assert row["low"] - 1e-9 <= row["score"] <= row["high"] + 1e-9
