"""`lazyllm` alone: what goes on at a boundary, ties included; where boundaries lie; settings that can't be."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts, Obs, PartContext, RequestRows
from firstlight.core.registry import Method, make_parts
from firstlight.tokens.lazyllm import LazyLLM, LazyLLMConfig


def model(layers: int = 30, windows: tuple[int | None, ...] | None = None) -> ModelFacts:
    return ModelFacts("a" * 64, layers, 4, 2, 16, windows or (None,) * layers)


def bound(config: LazyLLMConfig, facts: ModelFacts | None = None) -> LazyLLM:
    part = LazyLLM(config)
    part.bind(facts or model(), None)
    return part


def kept(score: dict[int, float], share: float, always: set[int]) -> list[int]:
    """ceil(p n), those that must stay first, then by score, ties by position."""
    ranked = sorted(score, key=lambda tok: (tok not in always, -score[tok], tok))
    return sorted(ranked[: max(math.ceil(share * len(score)), len(always & set(score)))])


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 80),
    levels=st.integers(1, 30),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.99]),
    first=st.integers(0, 6),
)
def test_what_goes_on_at_a_boundary(seed: int, n: int, levels: int, share: float, first: int) -> None:
    """In prefill among the rows alive; in decode among all, then among those chosen before."""
    generator = torch.Generator().manual_seed(seed)
    tok = torch.arange(2 * n)[torch.randperm(2 * n, generator=generator)[:n].sort().values]
    tok[-1] = 2 * n - 1
    colsum = torch.randint(0, levels, (2, n), generator=generator).float()
    score = dict(zip(tok.tolist(), colsum.sum(0).tolist()))
    part, context = bound(LazyLLMConfig([2, 5], [share, share], first)), PartContext("r", 2 * n, 30)
    obs = Obs(colsum, tok.expand(2, -1))
    cut = part.at_barrier(2, tok, obs, context)
    assert cut.park and cut.keep.tolist() == kept(score, share, {*range(first), 2 * n - 1})
    alive = cut.keep
    again = part.at_barrier(5, alive, obs, context)
    assert again.keep.tolist() == kept({t: score[t] for t in alive.tolist()}, share, {*range(first), 2 * n - 1})
    # The same in decode, where the prompt ended some tokens ago: what was generated since always goes on.
    context = PartContext("r", max(2 * n - 5, 1), 30, final=True, decode=True)
    rows, always = RequestRows(torch.zeros(1, 1), tok[-1:], tok[-1:]), {*range(first), *range(2 * n - 6, 2 * n)}
    at_2 = part.after_attend(2, rows, obs, context)
    assert at_2 is not None and at_2.keep.tolist() == kept(score, share, always)
    entered = part.before_layer(3, rows, tok[::3], context)
    assert entered is not None and torch.equal(entered.visible, at_2.keep)
    wanted = sorted(set(tok[::3].tolist()) & set(at_2.keep.tolist()))
    assert (entered.revive.tolist() if entered.revive is not None else []) == wanted
    assert context.notes["revived"] == len(wanted)
    at_5 = part.after_attend(5, rows, obs, context)
    assert at_5 is not None and at_5.keep.tolist() == kept({t: score[t] for t in at_2.keep.tolist()}, share, always)
    assert part.before_layer(0, rows, tok[:0], context) is None, "the next step begins with all tokens"


@pytest.mark.parametrize("share", ["0.55", "0.07", "0.7"])
def test_shares_are_counted_exactly(share: str) -> None:
    """ceil(p n) of the p that somebody wrote: 0.55 of 100 tokens are 55, though 0.55 * 100 is more than that."""
    exact = Fraction(share)
    part = bound(LazyLLMConfig([2], [float(exact)], always_first=0))
    for n in range(1, 700):
        tok, colsum = torch.arange(n), torch.rand(2, n)
        cut = part.at_barrier(2, tok, Obs(colsum, tok.expand(2, -1)), PartContext("r", n, 30))
        assert len(cut.keep) == math.ceil(exact * n), n


def test_where_boundaries_lie() -> None:
    assert bound(LazyLLMConfig()).barriers() == (8, 17, 26)
    assert bound(LazyLLMConfig(), model(32)).barriers() == (8, 18, 27)
    gemma = model(18, tuple(None if layer % 6 == 5 else 512 for layer in range(18)))
    assert bound(LazyLLMConfig(), gemma).barriers() == (5, 11), "the last layer is no boundary"
    assert bound(LazyLLMConfig([0, 29], [0.5, 0.5])).barriers() == (0,)
    assert bound(LazyLLMConfig(keep=[1.0])).barriers() == ()
    assert bound(LazyLLMConfig([3, 7], [1, 0.5])).barriers() == (7,)
    assert bound(LazyLLMConfig([3, 7], [1], decode_keep=[0.5, 1])).barriers() == (3,)
    assert LazyLLM(LazyLLMConfig(keep=[1.0])).capability.exact and not LazyLLM(LazyLLMConfig()).capability.exact


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": "0.5;0"}, "keep=.0.5, 0.0."),
        ({"keep": "1.01"}, "keep=.1.01."),
        ({"keep": ()}, "keep is empty"),
        ({"decode_keep": "2"}, "decode_keep=.2.0."),
        ({"always_first": -1}, "always_first=-1"),
        ({"boundaries": "8;40"}, "choose of 0, 1"),
        ({"boundaries": "8;3"}, "ascending"),
        ({"boundaries": "3;3"}, "ascending"),
        ({"boundaries": "3;5", "keep": "0.5;0.5;0.5"}, "3 shares for 2 boundaries"),
        ({"boundaries": "x"}, "not a whole number"),
    ],
)
def test_bad_settings_get_one_line(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_parts([Method("lazyllm", **given)], model())


def test_a_model_of_windows_is_refused() -> None:
    with pytest.raises(UserError, match="every layer has a window"):
        bound(LazyLLMConfig(), model(3, (9, 9, 9)))
