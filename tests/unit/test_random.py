"""`random`: its density, what it always reads, and that its dice know no chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from firstlight.attention.random import Random, RandomConfig
from firstlight.core.errors import UserError
from tests.plans import context, seen, some_qk

B, N = 16, 700
Q, K = some_qk(N)


def shown(rows: range = range(N), layer: int = 0, seed: int = 0, density: float = 0.4) -> Tensor:
    """bool [rows, Hq, entries]."""
    ctx = context(Q, K, rows, layer=layer)
    return seen(Random(RandomConfig(density, B, seed)).plan(ctx), ctx)


@pytest.mark.parametrize("density", [0.2, 0.4, 0.8])
def test_density_is_as_asked(density: float) -> None:
    whole = shown(density=density)
    late = torch.arange(N) >= 16 * B  # before that the first and the last block are more
    dense = (torch.arange(N)[late] + 1).sum() * 6
    assert float(whole[late].sum() / dense) == pytest.approx(density, abs=0.02)


def test_first_and_last_tokens_are_always_read_and_others_by_whole_blocks() -> None:
    made, row, entry = shown(), torch.arange(N)[:, None], torch.arange(N)
    forced = (entry <= row) & ((entry < B) | (row - entry < B))
    assert (made | ~forced[:, None]).all() and not (made & (entry > row)[:, None]).any()
    tile = made[40 * B : 41 * B, :, : 39 * B].unflatten(2, (39, B))
    assert torch.equal(tile.any(3), tile.all(3)) and torch.equal(tile.any(0), tile.all(0))
    assert not torch.equal(tile[0, 0], tile[0, 1])  # a list for each head


def test_dice_know_no_chunk_and_no_batch_but_seed_and_layer() -> None:
    whole = shown()
    for lo, hi in ((0, 1), (1, 333), (333, 334), (334, N)):
        assert torch.equal(shown(range(lo, hi)), whole[lo:hi, :, :hi])
    assert torch.equal(shown(), whole)
    assert not torch.equal(shown(seed=1), whole) and not torch.equal(shown(layer=1), whole)


def test_all_is_dense_and_so_are_short_prompts() -> None:
    assert Random(RandomConfig(1.0, B)).plan(context(Q, K, range(N))) is None
    assert Random(RandomConfig(0.2)).plan(context(Q, K, range(200), prompt_len=256)) is None


def test_missing_rows_and_entries_do_no_harm() -> None:
    rows = torch.tensor([*range(3, 30), *range(640, N)])
    plan = Random(RandomConfig(0.3, B)).plan(context(Q, K, rows, place=torch.arange(10, 10 + len(rows))))
    assert plan is not None and plan.blk_idx is not None and (plan.blk_idx < -(-(10 + len(rows)) // B)).all()


@pytest.mark.parametrize(("given", "said"), [({"density": 2}, "density=2"), ({"block": 100}, "block=100")])
def test_bad_values_name_themselves(given: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RandomConfig(**given)  # type: ignore[arg-type]
