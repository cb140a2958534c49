"""Mass recall and output error: the plain formulas over whole matrices, planted plans, and what an engine reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from firstlight.attention.band import Band, BandConfig
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.core.parts import Capability, PromptIds
from firstlight.core.registry import Method, Part, make_parts
from firstlight.core.request import Request, SamplingParams
from firstlight.evaluate.recall import Captured, capture, layers_of, measure, of_layer
from tests.tiny import VOCABULARY, tiny_engine

N, HEADS, KV_HEADS, DIM = 300, 6, 2, 16


def captured(n: int = N, cap: float | None = None) -> Captured:
    """One layer of random numbers, in which token 0 is a sink."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(h, n, DIM, generator=g) for h in (HEADS, KV_HEADS, KV_HEADS))
    q, k[:, 0] = q + 0.7, 1.0
    tok = torch.arange(n)
    ctx = PlanContext(3, q.transpose(0, 1), tok, tok, KV_HEADS, n, True, lambda: k, {}, scale=0.7)
    return Captured({3: ctx}, {3: (k, v)}, cap, HEADS)


def plainly(what: Captured, seen: torch.Tensor, head: int) -> list[float]:
    """density, recall, rest, error of a mask bool [n, n], by the book."""
    ctx, (k, v) = what.contexts[3], what.entries[3]
    group = head // (HEADS // KV_HEADS)
    scores = (ctx.q[:, head] @ k[group].T * ctx.scale).double()
    scores = scores if what.score_cap is None else what.score_cap * torch.tanh(scores / what.score_cap)
    causal = torch.ones_like(scores).tril().bool()
    dense = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    sparse = scores.masked_fill(~(causal & seen), -torch.inf).softmax(-1)
    out, want = sparse @ v[group].double(), dense @ v[group].double()
    kept = dense * seen
    return [
        float((seen & causal).sum() / causal.sum()),
        float(kept.sum(-1).mean()),
        float(kept[:, 1:].sum() / dense[:, 1:].sum()),
        float((out - want).norm() / want.norm()),
    ]


def band(sink: int, window: int) -> Part:
    return Part("band", "attention", Band(BandConfig(sink, window)), None, Band.capability)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_figures_are_those_of_whole_matrices(cap: float | None) -> None:
    what = captured(cap=cap)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    seen = (distance < 50) | (torch.arange(N) < 3)
    found = measure(what, [band(3, 50)])["layers"][0]
    for head in range(HEADS):
        got = [found["heads"][head][key] for key in ("density", "recall", "rest", "error")]
        assert got == pytest.approx(plainly(what, seen, head), rel=1e-4)
    assert found["recall"] == pytest.approx(sum(h["recall"] for h in found["heads"]) / HEADS)


def test_dense_loses_nothing_and_an_empty_plan_everything() -> None:
    what = captured()
    perfect = measure(what, [])
    assert perfect["density"] == perfect["recall"] == pytest.approx(1.0)
    assert perfect["rest"] == pytest.approx(1.0) and perfect["error"] < 1e-6
    some = band(1, 1).impl.plan(what.contexts[3])
    assert isinstance(some, AttnPlan)
    nothing = of_layer(what, 3, [(0, N, replace(some, band=torch.zeros_like(some.band)))])
    assert nothing["density"] == nothing["recall"] == nothing["rest"] == 0.0
    assert nothing["error"] == pytest.approx(1.0)


def test_a_sink_may_hold_the_mass_and_rest_tells() -> None:
    only_sink = measure(captured(), [band(1, 1)])
    assert only_sink["recall"] > only_sink["rest"] + 0.1


def test_what_a_planner_chose_by_looking_beats_a_band_of_equal_density() -> None:
    """The columns that hold most of the mass, planted, against as many that lie nearest."""
    what = captured()
    ctx, (k, v) = what.contexts[3], what.entries[3]
    k[:, torch.arange(5, N, 40)] *= 3
    what = Captured({3: ctx}, {3: (k, v)}, None, HEADS)
    some = band(1, 1).impl.plan(ctx)
    columns = torch.arange(5, N, 40, dtype=torch.int32)
    planted = replace(some, band=torch.tensor([[1, 8]], dtype=torch.int32))
    planted = replace(planted, col_ptr=torch.tensor([0, len(columns)], dtype=torch.int32), col_idx=columns)
    good, near = of_layer(what, 3, [(0, N, planted)]), of_layer(what, 3, [(0, N, band(1, 14).impl.plan(ctx))])
    assert good["density"] < near["density"] and good["recall"] > near["recall"] and good["error"] < near["error"]


class Chunked(Band):
    """A band that wants short passes, and counts them."""

    capability = Capability(chunk=128)
    passes: list[tuple[int, int, bool]]

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        assert ctx.keys().shape[1] == int(ctx.tok[-1]) + 1, "later keys aren't there yet"
        self.passes.append((int(ctx.tok[0]), int(ctx.tok[-1]), ctx.is_last_chunk))
        return super().plan(ctx)


def test_a_planner_that_wants_chunks_gets_them() -> None:
    what, planner = captured(), Chunked(BandConfig(3, 50))
    planner.passes = []
    found = measure(what, [Part("chunked", "attention", planner, None, planner.capability)])
    assert planner.passes == [(0, 127, False), (128, 255, False), (256, 299, True)]
    assert found["recall"] == pytest.approx(measure(what, [band(3, 50)])["recall"])


def test_layers_are_spread_and_leave_windows_out() -> None:
    assert layers_of([None] * 30) == [0, 5, 11, 17, 23, 29]
    assert layers_of([512, 512, None, 512, None, None], 2) == [2, 5]
    assert layers_of([None]) == [0]


def test_an_engine_gives_what_its_attention_reads() -> None:
    ids, methods = [n * 37 % VOCABULARY for n in range(400)], [Method("band", sink=4, window=40)]
    taken = capture(tiny_engine(prefix_cache="off"), PromptIds(ids), [0, 1])
    assert [tuple(t.shape) for t in taken.entries[1]] == [(2, 400, 16), (2, 400, 16)]
    assert torch.equal(taken.contexts[0].tok, torch.arange(400)) and taken.contexts[0].q.shape == (400, 6, 16)
    assert torch.equal(taken.context(0, 0, 400, {}).keys(), taken.entries[0][0])
    engine = tiny_engine(prefix_cache="off", method=methods)
    live = engine.add(Request("r", ids, SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()
    density = measure(taken, make_parts(methods))["density"]
    assert density == pytest.approx(live.stats.visible / live.stats.dense)
