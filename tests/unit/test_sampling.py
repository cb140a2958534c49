"""Sampling: distributions against numpy, filters and penalties, and dice that belong to a token, not to a batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.core.request import Request, SamplingParams
from firstlight.decode import sampling
from firstlight.decode.sampling import edit, pick, sample
from firstlight.decode.state import Decoding, die

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.5]),
    top_k=st.sampled_from([0, -1, 1, 3, 40, 300, 700]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]),
)
PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -1.0]),
        "logit_bias": st.dictionaries(st.integers(0, 29), st.sampled_from([-100.0, -1.5, 2.0]), max_size=4),
    }
)
WISHES: dict[str, Any] = {
    "temperature": 0.5,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {2: 1.0},
    "min_tokens": 1,
    "logprobs": 0,
}


def shares(**params: Any) -> list[float]:
    """How often each of four tokens comes, over an even grid of dice."""
    n = 2000
    given_params = [SamplingParams(**({"temperature": 1.0} | params))] * n
    tokens = pick(LOGITS.expand(n, -1), given_params, [(i + 0.5) / n for i in range(n)])
    return [tokens.count(t) / n for t in range(4)]


def near(got: list[float], want: list[float]) -> bool:
    return all(abs(a - b) < 2e-3 for a, b in zip(got, want))


def test_distributions_are_right() -> None:
    assert near(shares(), [0.1, 0.4, 0.2, 0.3])
    assert near(shares(top_k=2), [0, 4 / 7, 0, 3 / 7])
    assert near(shares(top_p=0.5), [0, 4 / 7, 0, 3 / 7])
    assert near(shares(top_p=0.39), [0, 1, 0, 0])
    assert near(shares(min_p=0.45), [0, 4 / 9, 2 / 9, 3 / 9])
    assert near(shares(top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7]), "0.7 of what top_k left is 0.78 of it"
    assert near(shares(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3])
    assert near(shares(temperature=0.5, min_p=0.5), [0, 16 / 25, 0, 9 / 25]), "min_p is a share at this temperature"
    assert shares(temperature=0.0) == [0, 1, 0, 0]


def filtered(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """In numpy, one filter after the other: the ids that are left, likeliest first, and their probabilities."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    x = logits[order].astype(np.float64) / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    for keep in (
        lambda p: p >= params.min_p * p[0],
        lambda p: np.arange(len(p)) < (params.top_k if params.top_k > 0 else len(p)),
        lambda p: np.cumsum(p) - p < params.top_p,
    ):
        left = keep(p)
        order, p = order[left], p[left] / p[left].sum()
    return order, p


@settings(max_examples=150)
@given(params=FILTERS, seed=st.integers(0, 10**6), spread=st.sampled_from([0.5, 3.0, 12.0]), tied=st.booleans())
def test_every_draw_is_numpys(params: SamplingParams, seed: int, spread: float, tied: bool) -> None:
    """600 tokens: more than are ranked at first, so that both ways to a draw are gone."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(600) * spread).astype(np.float32)
    logits = np.round(logits) if tied else logits
    dice = rng.random(40)
    order, p = filtered(logits, params)
    ends = np.cumsum(p)
    certain = np.abs(ends[:, None] - dice).min(0) > 1e-9
    want = order[np.minimum((ends[:, None] <= dice).sum(0), len(order) - 1)]
    got = pick(torch.from_numpy(logits).expand(40, -1), [params] * 40, dice.tolist())
    assert (np.array(got)[certain] == want[certain]).all()


@settings(max_examples=60)
@given(params=FILTERS, seed=st.integers(0, 10**6), width=st.sampled_from([2, 30, 599, 600]))
def test_how_many_are_ranked_first_changes_nothing(params: SamplingParams, seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(8, 600, generator=generator) * 4).round()
    dice = [die(seed, i) for i in range(8)]
    want = pick(logits, [params] * 8, dice)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_FEW", width)
        assert pick(logits, [params] * 8, dice) == want


def test_the_ends_of_the_dice_are_the_ends_of_the_distribution() -> None:
    highest = 1 - 2**-53
    assert pick(LOGITS, [SamplingParams(temperature=1.0)], [0.0]) == [1]
    assert pick(LOGITS, [SamplingParams(temperature=1.0)], [highest]) == [0], "the least likely token"
    assert pick(LOGITS, [SamplingParams(temperature=1.0, top_k=3)], [highest]) == [2]
    assert pick(LOGITS, [SamplingParams(temperature=1.0, top_p=0.5)], [highest]) == [3]


@pytest.mark.parametrize("size", [40, 600])
def test_what_is_forbidden_is_never_drawn(size: int) -> None:
    logits = torch.full((1, size), -torch.inf)
    logits[0, [3, size - 2]] = torch.tensor([0.3, 0.1])
    for dice in (0.0, 0.54, 0.56, 1 - 2**-53):
        assert pick(logits, [SamplingParams(temperature=1.7)], [dice])[0] in (3, size - 2)


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    for temperature in (1e-3, 1e-20, 1e-45, 1e-300):
        for logits in (LOGITS, LOGITS + 1e4, LOGITS - 1e4):
            assert pick(logits, [SamplingParams(temperature=temperature)], [0.999]) == [int(logits.argmax())]


def state(prompt: list[int], answer: list[int], rid: str = "r", **params: Any) -> Decoding:
    made = Decoding(Request(rid, prompt, SamplingParams(max_tokens=99, **params), eos_ids=frozenset({29})), seed=0)
    for token in answer:
        made.take(token)
    return made


def test_who_wishes_for_nothing_is_greedy() -> None:
    """Then all that is done is to look for the best token; any wish goes the long way."""

    def is_greedy(**wish: Any) -> bool:
        return Decoding(Request("r", [1], SamplingParams(**wish)), 0).is_greedy

    assert is_greedy() and is_greedy(stop=["x"], max_tokens=3)
    assert not any(is_greedy(**{key: value}) for key, value in WISHES.items())
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    assert sampling.best(logits) == [1, 0], "the first of equal ones"


@settings(max_examples=100)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 28), max_size=5), st.lists(st.integers(0, 28), max_size=5), PENALTIES),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 10**6),
)
def test_penalties_and_biases_are_numpys(rows: list[Any], seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((len(rows), 30)).astype(np.float32) * 4
    want = logits.astype(np.float64)
    for x, (prompt, answer, params) in zip(want, rows):
        for token, bias in params["logit_bias"].items():
            x[token] += bias
        for token in {*prompt, *answer}:
            x[token] *= params["repetition_penalty"] ** (-1 if x[token] > 0 else 1)
        for token, count in Counter(answer).items():
            x[token] -= params["presence_penalty"] + count * params["frequency_penalty"]
    got = torch.from_numpy(logits.copy())
    edit(got, [state(prompt, answer, **params) for prompt, answer, params in rows])
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)


def test_identity_values_change_no_bit() -> None:
    """Each parameter at its identity value, all of them beside rows that are changed."""
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    identities = {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
    }
    for key, value in identities.items():
        got = logits.clone()
        strong = state([1, 2], [3, 3], repetition_penalty=2.0, frequency_penalty=1.0, logit_bias={5: 9})
        edit(got, [state([1, 2], [3, 3], **{key: value}), strong, state([1, 2], [3])])
        assert torch.equal(got[[0, 2]], logits[[0, 2]]) and not torch.equal(got[1], logits[1])
    many = torch.randn(50, 600, generator=torch.Generator().manual_seed(2)) * 3
    dice = [die(1, i) for i in range(50)]
    want = pick(many, [SamplingParams(temperature=0.9)] * 50, dice)
    for key, value in {"top_k": 0, "top_p": 1.0, "min_p": 0.0}.items():
        assert pick(many, [SamplingParams(temperature=0.9, **{key: value})] * 50, dice) == want
    assert pick(many, [SamplingParams(temperature=0.9, top_k=600)] * 50, dice) == want


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(2, 30)
    logits[:, 29], logits[:, 7] = 9.0, 8.0
    early = state([1], [2], min_tokens=2, stop_token_ids=[7])
    assert sample(logits.clone(), [early, state([1], [2, 2], min_tokens=2)]) == [0, 29]
    assert early.take(29) == "stop", "with this one they are two"
    ignoring = state([1], [], min_tokens=2, ignore_eos=True)
    assert sample(logits[:1].clone(), [ignoring]) == [29]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_a_row_does_not_know_its_batch(seed: int) -> None:
    """Tokens and log-probabilities are bit for bit those of the row alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 600, generator=generator) * 3
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "logprobs": 3},
        {"temperature": 1.3, "top_k": 5, "repetition_penalty": 1.4},
        {"temperature": 1.0, "top_p": 0.8, "logit_bias": {4: 3.0}, "logprobs": 20},
        {"temperature": 0.2, "top_k": 3, "min_p": 0.1, "seed": seed, "frequency_penalty": 0.5},
        {"temperature": 3.0, "logprobs": 0},
    ]

    def states() -> list[Decoding]:
        return [state([1, 2, i], [4, 4, i], rid=f"r{i}", **params) for i, params in enumerate(asked)]

    together, alone = states(), states()
    tokens = sample(logits.clone(), together)
    assert tokens == [sample(logits[i : i + 1].clone(), alone[i : i + 1])[0] for i in range(6)]
    assert [s.logprobs for s in together] == [s.logprobs for s in alone]
    assert tokens[0] == int(logits[0].argmax())


def test_logprobs_are_the_models_own() -> None:
    """Before biases and temperature; the token itself first, then the likeliest."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    one = state([1], [], logprobs=2, logit_bias={11: 100.0}, temperature=0.5)
    assert sample(logits.clone(), [one]) == [11]
    want = torch.log_softmax(logits[0].double(), -1)
    order = want.argsort(descending=True).tolist()
    (entry,) = one.logprobs
    assert list(entry) == list(dict.fromkeys([11, *order[:2]]))
    for token, found in entry.items():
        assert abs(found.logprob - float(want[token])) < 1e-5 and found.rank == order.index(token) + 1


def test_dice_are_even_and_fixed() -> None:
    rolls = [die(7, i) for i in range(4000)]
    assert rolls == [die(7, i) for i in range(4000)]
    assert abs(sum(rolls) / 4000 - 0.5) < 0.02 and die(7, 1) != die(8, 1)
