"""`band`: what each row sees, when it is dense, and what it tells the engine about itself."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.attention.band import Q_TILE, Band, BandConfig
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.core.errors import UserError
from firstlight.core.registry import Method, classes, make_parts
from tests import plans

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS = 4, 2
sizes = {"sink": st.integers(0, 200), "window": st.integers(1, 300)}


def unread() -> torch.Tensor:
    raise AssertionError("band looks at no key")


def context(tok: torch.Tensor, prompt_len: int = 700) -> PlanContext:
    return PlanContext(0, torch.zeros(len(tok), HEADS, 8), tok, tok, KV_HEADS, prompt_len, True, unread, {})


def plan(config: BandConfig, tok: torch.Tensor, prompt_len: int = 700) -> AttnPlan | None:
    return Band(config).plan(context(tok, prompt_len))


def seen(config: BandConfig, lo: int, hi: int) -> torch.Tensor:
    """What rows [lo, hi) of a prompt see: bool [hi - lo, HEADS, hi]."""
    return plans.seen(plan(config, torch.arange(lo, hi)), context(torch.arange(lo, hi)))


@settings(max_examples=25)
@given(**sizes, lo=st.integers(0, 300), n=st.integers(1, 150))
def test_each_row_sees_sink_and_window(sink: int, window: int, lo: int, n: int) -> None:
    mask = seen(BandConfig(sink, window), lo, lo + n)
    row, entry = torch.arange(lo, lo + n)[:, None], torch.arange(lo + n)
    assert torch.equal(mask.sum(-1), torch.clamp(row + 1, max=sink + window).expand(-1, HEADS))
    assert torch.equal(mask[:, 0], (entry <= row) & ((entry < sink) | (row - entry < window)))
    assert torch.equal(mask, mask[:, :1].expand_as(mask))


@settings(max_examples=25)
@given(**sizes, cuts=st.lists(st.integers(1, 399), max_size=3, unique=True))
def test_chunks_see_what_the_whole_sees(sink: int, window: int, cuts: list[int]) -> None:
    config = BandConfig(sink, window)
    whole = seen(config, 0, 400)
    for lo, hi in pairwise([0, *sorted(cuts), 400]):
        assert torch.equal(seen(config, lo, hi), whole[lo:hi, :, :hi])
        assert not whole[lo:hi, :, hi:].any()


def test_dense_exactly_when_the_band_covers_prompt_and_rows() -> None:
    config = BandConfig(sink=50, window=100)
    assert plan(config, torch.arange(150), prompt_len=150) is None
    assert plan(config, torch.arange(20), prompt_len=150) is None
    # The prompt decides for all its chunks, so that no chunk border shows; then each generated row for itself.
    assert plan(config, torch.arange(20), prompt_len=151) is not None
    assert plan(config, torch.tensor([149]), prompt_len=100) is None
    assert plan(config, torch.tensor([150]), prompt_len=100) is not None


def test_plan_is_one_list_for_all_tiles() -> None:
    made = plan(BandConfig(4, 32), torch.tensor([3 * Q_TILE - 1, 3 * Q_TILE, 5 * Q_TILE]))
    assert made is not None and made.num_lists == 1 and made.band.tolist() == [[4, 32]]
    assert made.tile_first.tolist() == [2] and made.tile_base.tolist() == [0, 4] and made.tile_map.tolist() == [0] * 4
    assert made.head_map.tolist() == [0] * HEADS and made.blk_ptr is None and made.col_ptr is None


@pytest.mark.parametrize(("key", "value"), [("sink", -1), ("window", 0), ("window", None), ("sink", 1.5)])
def test_bad_sizes_name_key_and_value(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key}={value}"):
        BandConfig(**{key: value})


def test_registry_knows_it() -> None:
    assert classes("band") == {"attention": Band}
    (part,) = make_parts([Method.parse("band:sink=8,window=16")])
    assert part.seam == "attention" and part.impl.config == part.config == BandConfig(8, 16)
    assert not part.capability.exact and part.capability.alters_cells
    assert part.capability.prefix_stable and part.capability.chunk_invariant
    assert all(field.metadata["doc"] for field in dataclasses.fields(BandConfig))
    with pytest.raises(UserError, match="window=0"):
        make_parts([Method.parse("band:window=0")])
