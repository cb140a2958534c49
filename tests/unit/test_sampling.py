"""Sampling: greedy, the filters, and dice that belong to a token, not to a batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.core.request import SamplingParams
from firstlight.decode.sampling import die, sample

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def shares(**params: float) -> list[float]:
    """How often each of four tokens comes, over an even grid of dice."""
    n = 2000
    given_params = [SamplingParams(temperature=params.pop("temperature", 1.0), **params)] * n  # type: ignore[arg-type]
    tokens = sample(LOGITS.expand(n, -1), given_params, [(i + 0.5) / n for i in range(n)])
    return [tokens.count(t) / n for t in range(4)]


def near(got: list[float], want: list[float]) -> bool:
    return all(abs(a - b) < 2e-3 for a, b in zip(got, want))


def test_distributions_are_right() -> None:
    assert near(shares(), [0.1, 0.4, 0.2, 0.3])
    assert near(shares(top_k=2), [0, 4 / 7, 0, 3 / 7])
    assert near(shares(top_p=0.5), [0, 4 / 7, 0, 3 / 7])
    assert near(shares(top_p=0.39), [0, 1, 0, 0])
    assert near(shares(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3])
    assert shares(temperature=0.0) == [0, 1, 0, 0]


def test_the_ends_of_the_dice_are_the_ends_of_the_distribution() -> None:
    highest = 1 - 2**-53
    assert sample(LOGITS, [SamplingParams(temperature=1.0)], [0.0]) == [1]
    assert sample(LOGITS, [SamplingParams(temperature=1.0)], [highest]) == [0], "the least likely token"
    assert sample(LOGITS, [SamplingParams(temperature=1.0, top_k=3)], [highest]) == [2]
    assert sample(LOGITS, [SamplingParams(temperature=1.0, top_p=0.5)], [highest]) == [3]


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    for temperature in (1e-3, 1e-20, 1e-45, 1e-300):
        for logits in (LOGITS, LOGITS + 1e4, LOGITS - 1e4):
            assert sample(logits, [SamplingParams(temperature=temperature)], [0.999]) == [int(logits.argmax())]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_a_row_does_not_know_its_batch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 300, generator=generator) * 3
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p)
        for t, k, p in ((0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.2, 3, 0.5))
    ]
    dice = [die(seed, i) for i in range(5)]
    together = sample(logits, params, dice)
    assert together == [sample(logits[i : i + 1], params[i : i + 1], dice[i : i + 1])[0] for i in range(5)]
    assert together[0] == int(logits[0].argmax())


def test_dice_are_even_and_fixed() -> None:
    rolls = [die(7, i) for i in range(4000)]
    assert rolls == [die(7, i) for i in range(4000)]
    assert abs(sum(rolls) / 4000 - 0.5) < 0.02 and die(7, 1) != die(8, 1)
