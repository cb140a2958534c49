"""`trishape`: its two modes against their formulas, chunks, and what it says of itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.trishape import Q_TILE, TriShape, TriShapeConfig
from firstlight.core.errors import UserError
from tests.plans import context, seen, some_qk

N = 300
Q, K = some_qk(N)


def shown(config: TriShapeConfig, lo: int, hi: int) -> Tensor:
    """bool [hi - lo, hi]: what rows of one chunk see; all heads alike."""
    ctx = context(Q, K, range(lo, hi))
    mask = seen(TriShape(config).plan(ctx), ctx)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    return mask[:, 0]


@settings(max_examples=20)
@given(
    st.integers(0, 80),
    st.integers(1, 200),
    st.integers(0, 120),
    st.lists(st.integers(1, N - 1), max_size=3, unique=True),
)
def test_strict_is_its_formula_whatever_the_chunks(sink: int, window: int, tail: int, cuts: list[int]) -> None:
    row, entry = torch.arange(N)[:, None], torch.arange(N)
    dense = (row >= (N - tail) // Q_TILE * Q_TILE) & (tail > 0)
    want = (entry <= row) & ((entry < sink) | (row - entry < window) | dense)
    for lo, hi in pairwise([0, *sorted(cuts), N]):
        assert torch.equal(shown(TriShapeConfig(sink, window, tail), lo, hi), want[lo:hi, :hi])


def test_openvino_skips_whole_blocks_before_the_chunk() -> None:
    # Blocks of 32, chunks of 256, sink 64 = 2 blocks, window 128 = 4 blocks, tail 100, prompt 1,000.
    config = TriShapeConfig(sink=64, window=128, tail=100, mode="openvino", block=32)
    q, k = some_qk(1000)
    skipped = {}
    for lo in range(0, 1000, 256):
        ctx = context(q, k, range(lo, min(lo + 256, 1000)))
        mask = seen(TriShape(config).plan(ctx), ctx)[:, 0]
        hidden = (~mask & (torch.arange(mask.shape[1]) <= ctx.tok[:, None])).any(0).nonzero()[:, 0]
        assert not mask[:, hidden].any()  # the same for all rows of the chunk
        skipped[lo] = (int(hidden[0]), int(hidden[-1]) + 1, len(hidden)) if len(hidden) else None
    # 256: 8 blocks before it, [2, 4) go. 512: 16, [2, 12). 768: the prompt ends within it, so it is dense.
    assert skipped == {0: None, 256: (64, 128, 64), 512: (64, 384, 320), 768: None}
    # With the end further away than the tail the chunk at 768 would skip [2, 20); a ragged begin counts whole blocks.
    for begin, end in ((768, 640), (770, 640), (799, 640), (800, 672)):
        ctx = context(q, k, range(begin, 900))
        mask = seen(TriShape(config).plan(ctx), ctx)[:, 0]
        assert not mask[:, 64:end].any() and mask[:, :64].all() and mask[:, end:begin].all()
    assert TriShape(config).plan(context(q, k, range(800, 901))) is None


def test_dense_where_the_sizes_cover_the_prompt() -> None:
    def plan(**sizes: int) -> object:
        return TriShape(TriShapeConfig(**sizes)).plan(context(Q, K, range(100, 120)))

    assert plan(sink=0, window=N) is None and plan(sink=20, window=N - 20) is None and plan(window=8, tail=N) is None
    assert plan(sink=20, window=N - 21) is not None and plan(window=8, tail=N - 1) is not None


def test_says_what_it_breaks() -> None:
    tailed, plain = TriShape(TriShapeConfig()).capability, TriShape(TriShapeConfig(tail=0)).capability
    chunked = TriShape(TriShapeConfig(mode="openvino")).capability
    assert tailed.chunk_invariant and not tailed.prefix_stable and plain.prefix_stable
    assert not chunked.chunk_invariant and not chunked.prefix_stable and chunked.chunk == 256


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": 0}, "window=0"),
        ({"tail": -1}, "tail=-1"),
        ({"mode": "loose"}, "strict or openvino"),
        ({"block": 48}, "block=48"),
        ({"mode": "openvino", "sink": 100}, "multiples of 32"),
    ],
)
def test_bad_values_name_themselves(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TriShapeConfig(**given)  # type: ignore[arg-type]
