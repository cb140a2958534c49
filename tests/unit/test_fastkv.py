"""`fastkv`'s two parts alone: kept sets by the paper's formulas, ties included; settings that can't be; shared keys."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.cache.fastkv import FastKVRetention, FastKVRetentionConfig
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts, Obs, PartContext
from firstlight.core.registry import Method, classes, make_parts, names
from firstlight.kernels.ranking import before_window, best
from firstlight.tokens.fastkv import FastKVRows, FastKVRowsConfig
from firstlight.train.fastkv import settles

HEADS = 2
rates = st.sampled_from([0.01, 0.1, 0.2, 0.37, 0.5, 0.99])


def model(layers: int = 4, windows: tuple[int | None, ...] | None = None) -> ModelFacts:
    return ModelFacts("a" * 64, layers, 4, HEADS, 16, windows or (None,) * layers)


def masses(seed: int, n: int, levels: int) -> torch.Tensor:
    """Whole numbers: with few levels most of them are ties, and no sum is rounded."""
    return torch.randint(0, levels, (HEADS, n), generator=torch.Generator().manual_seed(seed)).float()


def observed(colsum: torch.Tensor) -> Obs:
    return Obs(colsum, torch.arange(colsum.shape[1]).expand(HEADS, -1))


def pooled(colsum: list[float], window: int, kernel: int) -> list[float]:
    """Step 3 of the method, place by place: a mean over `kernel` places, zeros beyond the ends."""
    row, half = colsum[: len(colsum) - window], kernel // 2
    return [sum(row[max(j - half, 0) : j + half + 1]) for j in range(len(row))]


def top(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


sizes = {
    "seed": st.integers(0, 10**6),
    "n": st.integers(1, 150),
    "levels": st.integers(1, 40),
    "rate": rates,
    "window": st.sampled_from([1, 2, 8, 33]),
    "kernel": st.sampled_from([1, 3, 7]),
}


@settings(max_examples=150)
@given(**sizes)
def test_rows_that_go_on(seed: int, n: int, levels: int, rate: float, window: int, kernel: int) -> None:
    colsum = masses(seed, n, levels)
    part = FastKVRows(FastKVRowsConfig(1, rate, window, kernel))
    context = PartContext("r", n, 4)
    keep = part.at_barrier(1, torch.arange(n), observed(colsum), context).keep.tolist()
    count = max(int(n * rate), window)
    if n <= count:
        assert keep == list(range(n)) and "why" in context.notes
        return
    summed = [sum(pair) for pair in zip(*(pooled(head, window, kernel) for head in colsum.tolist()))]
    assert keep == top(summed, count - window) + list(range(n - window, n))
    assert len(keep) == count == context.notes["rows"]


@settings(max_examples=150)
@given(**sizes)
def test_entries_that_stay(seed: int, n: int, levels: int, rate: float, window: int, kernel: int) -> None:
    colsum = masses(seed, n, levels)
    part = FastKVRetention(FastKVRetentionConfig(rate, window, kernel))
    obs, context = observed(colsum), PartContext("r", n, 4)
    keep = part.after_layer(0, obs.tok, [n] * HEADS, obs, context)
    capacity = max(int(n * rate), window)
    assert (keep is None) == (n <= capacity)
    for head, idx in enumerate(keep.idx if keep else ()):
        scores = pooled(colsum[head].tolist(), window, kernel)
        assert idx.tolist() == top(scores, capacity - window) + list(range(n - window, n)) and len(idx) == capacity


def test_retention_counts_the_prompt_not_the_rows_that_got_there() -> None:
    """Above the cut 20 of 100 rows are alive; a tenth of the prompt stays all the same, and all of them at a half."""
    obs = Obs(masses(0, 20, 9), torch.arange(0, 100, 5).expand(HEADS, -1))
    for rate, count in ((0.1, 10), (0.5, None)):
        keep = FastKVRetention(FastKVRetentionConfig(rate)).after_layer(
            3, obs.tok, [20] * 2, obs, PartContext("r", 100, 4)
        )
        assert [len(idx) for idx in keep.idx] == [count] * HEADS if keep else count is None


@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 5), st.integers(0, 10**6))
def test_best_is_a_stable_sort(n: int, count: int, levels: int, seed: int) -> None:
    score = masses(seed, n, levels)
    chosen = best(score, count)
    for row, mask in zip(score.tolist(), chosen):
        assert mask.nonzero().flatten().tolist() == top(row, count)
    assert best(torch.full((3,), -math.inf), 2).tolist() == [True, True, False]


def test_scores_leave_the_window_out_and_count_zeros_past_the_ends() -> None:
    colsum = torch.tensor([[7.0, 7, 7, 7, 7, 7, 7, 7, 99, 99]])
    assert before_window(colsum, 2, 7)[0].tolist() == pytest.approx([4, 5, 6, 7, 7, 6, 5, 4])


def test_where_the_cut_is() -> None:
    def layer(config: FastKVRowsConfig, facts: ModelFacts, calibration: Calibration | None = None) -> int | None:
        part = FastKVRows(config)
        part.bind(facts, calibration)
        assert part.barriers() == (part.layer,)
        assert [at for at in range(facts.num_layers) if part.probe(at)] == [part.layer]
        return part.layer

    found = Calibration("fastkv", "a" * 64, {}, {}, {"tsp_idx": 2})
    assert layer(FastKVRowsConfig(), model(30)) == 14
    assert layer(FastKVRowsConfig(), model(30), found) == 2
    assert layer(FastKVRowsConfig(tsp_idx=3), model(30), found) == 3
    hybrid = model(6, (9, 9, None, 9, 9, None))
    assert layer(FastKVRowsConfig(), hybrid) == 2
    for config, facts, said in (
        (FastKVRowsConfig(tsp_idx=4), hybrid, "tsp_idx=4 .* choose 2, 5"),
        (FastKVRowsConfig(tsp_idx=30), model(30), "tsp_idx=30 .* choose 0 to 29"),
        (FastKVRowsConfig(tsp_idx=-1), model(30), "tsp_idx=-1"),
        (FastKVRowsConfig(), model(3, (9, 9, 9)), "every layer of this model has a window"),
    ):
        with pytest.raises(UserError, match=said):
            FastKVRows(config).bind(facts, None)


def test_off_is_exact_and_asks_for_nothing() -> None:
    parts = {part.seam: part.impl for part in make_parts([Method("fastkv", tsp_rate=1, retain_rate=1)], model())}
    rows, retention = parts["tokens"], parts["cache"]
    assert rows.barriers() == () and rows.probe(1) is None and retention.probe(1) is None
    assert rows.capability.exact and retention.capability.exact and not rows.capability.alters_cells
    hybrid = FastKVRetention(FastKVRetentionConfig())
    hybrid.bind(model(3, (9, None, 9)), None)
    assert [hybrid.probe(layer) is not None for layer in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tsp_rate": 0}, "tsp_rate=0"),
        ({"tsp_rate": 1.5}, "tsp_rate=1.5"),
        ({"retain_rate": -0.1}, "retain_rate=-0.1"),
        ({"retain_rate": float("nan")}, "retain_rate=nan"),
        ({"window": 0}, "window=0"),
        ({"window": 129}, "window=129"),
        ({"kernel": 4}, "kernel=4"),
        ({"tsp_idx": "x"}, "tsp_idx='x'"),
        ({"rate": 1}, "it has: calibration, kernel, retain_rate, tsp_idx, tsp_rate, window"),
    ],
)
def test_bad_settings_get_one_line(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_parts([Method("fastkv", **given)])


def test_keys_that_two_parts_share_are_declared_alike() -> None:
    for name in names():
        declared: dict[str, object] = {}
        for cls in classes(name).values():
            for each in dataclasses.fields(cls.Config):
                facts = (each.type, each.default, each.metadata["doc"])
                assert declared.setdefault(each.name, facts) == facts, f"{name}: {each.name}"


def test_where_a_curve_settles() -> None:
    assert settles([0.9, 0.3, 0.7, 0.6, 0.65], 0.15, 0) == 2
    assert settles([0.7, 0.7, 0.7], 0.0, 0) == 0
    assert settles([0.7, 0.7, 0.7], 0.0, 1) == 1
    assert settles([0.1, 0.9], 0.15, 0) == 1
