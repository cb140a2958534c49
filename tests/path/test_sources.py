"""K/V from a source: loaded cells serve as computed ones do, in any schedule, wherever they were made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.core.parts import (
    Capability,
    Cells,
    Cut,
    Enter,
    KVSource,
    PartContext,
    RequestRows,
    RowPolicy,
    Span,
    SpanKV,
)
from firstlight.core.registry import Part
from firstlight.models.decoder import Decoder
from tests.path.law_runs import Asked, Logits, chaotic, differences, engine, one_shot, run
from tests.tiny import VOCABULARY, tiny_model

LAYERS, ENTERS = 4, 2
Key = tuple[int, ...]


@dataclass
class Memory(KVSource):
    """Remembers every prompt's cells, and gives some spans of them when the same prompt comes again."""

    fidelity: str = "exact"
    moved: int = 0
    """The keys come rotated for positions that are smaller by this."""
    rotated: bool = True
    cells: dict[Key, list[Cells]] = field(default_factory=dict)
    hidden: dict[Key, Tensor] = field(default_factory=dict)
    model: Decoder | None = None

    def store(self, ctx: PartContext, read: Callable[[int], Cells]) -> None:
        self.cells[tuple(ctx.ids)] = [read(layer) for layer in range(ctx.num_layers)]

    def find(self, ctx: PartContext) -> Sequence[Span]:
        ids = tuple(ctx.ids)
        if ids not in self.cells:
            return []
        rng = random.Random(len(ids))
        ends = sorted(rng.randrange(len(ids) + 1) for _ in range(4))
        at = ENTERS if self.hidden else None
        return [Span(lo, hi, ids, self.fidelity, at) for lo, hi in (ends[:2], ends[2:]) if lo < hi]  # type: ignore[arg-type]

    def load(self, span: Span, layer: int) -> SpanKV | None:
        cells, tok = self.cells[span.handle][layer], torch.arange(span.lo, span.hi)
        k, v = cells.k[span.lo : span.hi], cells.v[span.lo : span.hi]
        if not self.moved and self.rotated:
            return SpanKV(k, v, tok)
        assert self.model is not None
        away = torch.full_like(tok, -self.moved) if self.rotated else -tok
        return SpanKV(self.model.turn(layer, k, away, again=True), v, tok + away, self.rotated)

    def load_hidden(self, span: Span) -> Tensor:
        return self.hidden[span.handle][span.lo : span.hi]

    def parts(self, *policies: RowPolicy) -> list[Part]:
        capability = Capability(prefix_stable=False)
        made = [Part("memory", "reuse", self, None, capability)]
        return made + [Part("memory", "tokens", policy, None, capability) for policy in policies]


class Blend(RowPolicy):
    """Computes all rows up to a layer, finds nothing changed there, and goes on with every third."""

    def __init__(self) -> None:
        self.deviation: list[float] = []

    def on_kv(
        self, layer: int, rows: RequestRows, k: Tensor, v: Tensor, old: Cells | None, ctx: PartContext
    ) -> Cut | None:
        if layer != 1 or old is None or ctx.decode:
            return None
        both = old.tok[torch.isin(old.tok, rows.tok)]
        new, was = torch.isin(rows.tok, both), torch.isin(old.tok, both)
        self.deviation.append(float((v[new].float() - old.v[was].float()).square().sum()))
        return Cut(keep=rows.tok[~torch.isin(rows.tok, both) | (rows.tok % 3 == 0)], early=True)


class Relay(RowPolicy):
    """Tokens of spans have no row below a layer; there some come back from the source's hidden rows."""

    def __init__(self, source: Memory) -> None:
        self.source, self.revived = source, 0

    def rows0(self, tok: Tensor, ctx: PartContext) -> Tensor | None:
        has_row = torch.ones(len(tok), dtype=torch.bool)
        for span in self.source.find(ctx):
            has_row &= (tok < span.lo) | (tok >= span.hi)
        return has_row

    def before_layer(self, layer: int, rows: RequestRows, parked: Tensor, ctx: PartContext) -> Enter | None:
        if layer != ENTERS or ctx.decode:
            return None
        self.revived += len(parked)
        return Enter(revive=parked)


class Watcher(RowPolicy):
    """Notes the rows that enter a layer."""

    def __init__(self, source: Memory) -> None:
        self.source = source

    def before_layer(self, layer: int, rows: RequestRows, parked: Tensor, ctx: PartContext) -> Enter | None:
        if layer == ENTERS and not ctx.decode:
            self.source.hidden[tuple(ctx.ids)] = rows.x.clone()
        return None


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return tiny_model(dtype=request.param, num_layers=LAYERS)


def example(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 63, 65, 130, 200, 700]) for _ in range(2)]
    return [
        Asked(f"r{i}", tuple(rng.randrange(VOCABULARY) for _ in range(length)), 3) for i, length in enumerate(lengths)
    ]


def taught(model: Decoder, asked: list[Asked], source: Memory) -> Logits:
    """One dense pass of each, which the source watches."""
    source.model = model
    watchers = [Watcher(source)] if source.fidelity == "relay" else []
    return one_shot(model, asked, parts=source.parts(*watchers))


def present(want: Logits, got: Logits) -> Logits:
    """Rows that have logits under a source."""
    return {rid: {tok: row for tok, row in rows.items() if tok in got[rid]} for rid, rows in want.items()}


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_exact_spans_spare_their_rows_and_change_nothing(model: Decoder, seed: int) -> None:
    asked, source = example(seed), Memory()
    want = taught(model, asked, source)
    spared = sum(span.hi - span.lo for a in asked for span in source.find(PartContext("", len(a.ids), 0, ids=a.ids)))
    got, _ = chaotic(model, asked, seed, parts=source.parts())
    assert differences(got, present(want, got)) == []
    last = sum(a.new_tokens for a in asked)
    missing = sum(len(a.ids) + a.new_tokens for a in asked) - last - sum(len(r) for r in got.values()) + last
    assert 0 <= spared - (missing - len(asked)) <= 2 * len(asked)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_a_blend_computes_over_what_was_loaded(model: Decoder, seed: int) -> None:
    asked, source, policy = example(seed), Memory("blend"), Blend()
    want = taught(model, asked, source)
    got, _ = chaotic(model, asked, seed, parts=source.parts(policy))
    assert differences(got, present(want, got)) == []
    assert policy.deviation == [0.0] * len(policy.deviation)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_hidden_rows_come_back_where_the_source_has_them(model: Decoder, seed: int) -> None:
    asked, source = example(seed), Memory("relay")
    want = taught(model, asked, source)
    policy = Relay(source)
    got, _ = chaotic(model, asked, seed, parts=source.parts(policy))
    assert differences(got, want) == []
    assert policy.revived or all(len(a.ids) < 10 for a in asked)


@pytest.mark.parametrize("moved, rotated", [(70, True), (-5, True), (0, False)])
def test_keys_are_turned_to_where_their_tokens_stand(moved: int, rotated: bool) -> None:
    model, asked, source = tiny_model(num_layers=LAYERS), example(11), Memory()
    want = taught(model, asked, source)
    source.moved, source.rotated = moved, rotated
    got = one_shot(model, asked, parts=source.parts())
    apart = [difference for _, _, difference in differences(got, present(want, got))]
    assert apart and max(apart) < 1e-4
    source.moved, source.rotated = moved, True
    assert source.cells


def test_the_report_counts_what_a_source_gave() -> None:
    model, source = tiny_model(num_layers=LAYERS), Memory()
    asked = [Asked("one", tuple(range(200)), 1)]
    taught(model, asked, source)
    made = engine(model, "sarathi", 64, source.parts(), cached=False)
    lives = []
    made._forget, forget = lambda live: (lives.append(live), forget(live))[1], made._forget  # type: ignore[method-assign]
    run(made, asked)
    spans = source.find(lives[0].source_context)
    assert lives[0].reused == LAYERS * sum(span.hi - span.lo - (span.hi == 200) for span in spans) > 0
    assert sum(lives[0].computed) + lives[0].reused == 200 * LAYERS


def test_early_leavers_are_spared_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = tiny_model(num_layers=LAYERS), Memory("blend")
    asked = [Asked("one", tuple(range(200)), 1)]
    taught(model, asked, source)
    finished: dict[int, int] = {}
    finish = model.finish

    def counted(layer: int, x: Tensor, attended: Tensor) -> None:
        finished[layer] = finished.get(layer, 0) + int(x.any(-1).sum())
        finish(layer, x, attended)

    monkeypatch.setattr(model, "finish", counted)
    one_shot(model, asked, parts=source.parts(Blend()))
    assert finished[0] == 200 > finished[1] == finished[2] == finished[3]
