"""`blasst`: thresholds from a calibration, and the counting of would-be skips against a plain walk over blocks."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from firstlight.attention.blasst import HIGHEST, PHASES, SCANS, Blasst, BlasstConfig
from firstlight.core.attn import PlanContext
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.train.blasst import THRESHOLDS, Config, fit, layer_counts

FACTS = ModelFacts("a" * 64, 2, 4, 2, 16, (None, None))
FITS = Calibration("blasst", "a" * 64, {}, {}, Blasst.sample(FACTS), "somewhere")


def bound(found: Calibration | None = FITS, **config: object) -> Blasst:
    made = Blasst(BlasstConfig(**config))  # type: ignore[arg-type]
    made.bind(FACTS, found)
    return made


def context(begin: int, n: int, prompt_len: int) -> PlanContext:
    tok = torch.arange(begin, begin + n)
    return PlanContext(0, torch.zeros(n, 4, 16), tok, tok, 2, prompt_len, True, lambda: torch.zeros(0), {}, tok)


def test_lambda_is_scale_over_the_length_of_the_prompt() -> None:
    """Of the prompt, not of the chunk, and of all that there is for generated tokens."""
    planner = bound(sparsity=0.5)
    scale = 10 * math.exp(3 * 0.5)
    for begin, n, length in ((0, 100, 4000), (1024, 512, 4000), (4000, 1, 4001)):
        plan = planner.plan(context(begin, n, 4000))
        assert plan is not None and plan.skip_log is not None
        assert plan.skip_log.tolist() == [pytest.approx([math.log(scale / length)] * 4)]
        assert len(plan.tile_map) == (begin + n - 1) // 128 - begin // 128 + 1
    short = bound(sparsity=0.9, scan="desc").plan(context(0, 10, 20))
    assert short is not None and float(short.skip_log[0, 0]) == pytest.approx(math.log(HIGHEST))  # type: ignore[index]
    assert short.scan == SCANS.index("desc")
    assert bound(decode=False).prompt_only and not bound().prompt_only
    assert bound(scale=8.0, found=None).threshold(1000, False) == pytest.approx(math.log(0.008))


def test_nothing_to_skip_is_dense_and_no_calibration_is_told() -> None:
    assert bound(found=None, sparsity=0.0).plan(context(0, 100, 4000)) is None
    assert bound(found=None, scale=0.0).plan(context(0, 100, 4000)) is None
    with pytest.raises(UserError, match="firstlight calibrate"):
        bound(found=None)
    other = Calibration("blasst", "a" * 64, {}, {}, {"scans": {"asc": FITS.values["scans"]["asc"]}}, "somewhere")
    with pytest.raises(UserError, match="scan=desc"):
        bound(other, scan="desc")
    for bad in ({"sparsity": 1.0}, {"scale": -1.0}, {"scan": "up"}):
        with pytest.raises(UserError, match=next(iter(bad))):
            BlasstConfig(**bad)  # type: ignore[arg-type]


def walked(q: Tensor, k: Tensor, scan: str, below: float, rows: range) -> tuple[int, int]:
    """(blocks skipped, blocks) of the rows of one KV head: q [n, G, d], k [n, d], walked one by one."""
    skipped = visited = 0
    for t, g in product(rows, range(q.shape[1])):
        order = list(range(t // 64 + 1))
        order = {"asc": order, "desc": order[::-1], "sink-then-desc": order[:1] + order[:0:-1]}[scan]
        top = -math.inf
        for block in order:
            best = float((k[block * 64 : min(block * 64 + 64, t + 1)] @ q[t, g]).max())
            visited += 1
            skipped += top > -math.inf and best - top < below
            top = max(best, top)
    return skipped, visited


@pytest.mark.parametrize("scan", SCANS)
def test_one_pass_counts_what_each_threshold_would_skip(scan: str) -> None:
    generator, n = torch.Generator().manual_seed(3), 300
    q, k = 2 * torch.randn(n, 3, 8, generator=generator), torch.randn(n, 1, 8, generator=generator)
    counted = layer_counts(q, k)[SCANS.index(scan)]
    for at in (9, 15):
        below = math.log(THRESHOLDS[at])
        assert counted[0, [at, -1]].tolist() == list(walked(q, k[:, 0], scan, below, range(n)))
        assert counted[1, [at, -1]].tolist() == list(walked(q, k[:, 0], scan, below, range(n - 64, n)))
    assert bool((counted[:, 1:-1] >= counted[:, :-2]).all())


def test_a_fit_finds_the_law_that_made_the_counts() -> None:
    lengths = (512, 1024, 2048, 4096)
    scale = torch.tensor(lengths)[:, None] * torch.tensor(THRESHOLDS, dtype=torch.float64)
    share = ((scale / 3.0).log() / 7.0).clamp(0, 1)
    found = fit(torch.cat([share * 1000, torch.full((4, 1), 1000.0)], 1), lengths)
    assert (found["a"], found["b"]) == (pytest.approx(3.0), pytest.approx(7.0))
    with pytest.raises(UserError, match="length"):
        fit(torch.ones(4, len(THRESHOLDS) + 1), lengths)
    with pytest.raises(UserError, match="tokens"):
        Config(length=100)
    assert len(PHASES) == 2
