"""`fastkv` in the engine: against plain dense tensors, under any schedule, at short prompts, in memory, cancelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.engine.engine import Engine
from firstlight.engine.report import report
from firstlight.kernels.kv_layout import BLOCK
from firstlight.models.decoder import Decoder
from tests.path.method_runs import begin, finish, method_engine, prompt, run, same_bits
from tests.tiny import tiny_engine

METHOD = "fastkv:tsp_idx=1,tsp_rate=0.3,retain_rate=0.2"
LAYERS = 5


class Plain:
    """FastKV written down with dense tensors, one prompt at a time: what is alive, what is kept, and the logits."""

    def __init__(self, model: Decoder, tsp_idx: int, tsp_rate: float, retain_rate: float) -> None:
        self.model, self.tsp_idx, self.rates = model, tsp_idx, (tsp_rate, retain_rate)
        self.k: list[list[Tensor]] = []
        """Layer, KV head -> keys of the kept entries [n, d], with their values and ordinals in v and tok."""
        self.v: list[list[Tensor]] = []
        self.tok: list[list[list[int]]] = []

    def prefill(self, ids: list[int], w: int = 8) -> Tensor:
        """Logits of the last row."""
        total, alive = len(ids), torch.arange(len(ids))
        x = self.model.embed(torch.tensor(ids))
        for layer in range(self.model.config.num_layers):
            q, k, v = self.model.qkv(layer, x, *self.model.rope(alive))
            group, n = q.shape[1] // k.shape[1], len(alive)
            scores = torch.einsum("ahd,bhd->hab", q, k.repeat_interleave(group, 1)) * self.model.scale
            mass = scores.masked_fill(alive > alive[:, None], -torch.inf).softmax(-1)
            self.model.finish(layer, x, torch.einsum("hab,bhd->ahd", mass, v.repeat_interleave(group, 1)))
            window = mass[:, -w:].sum(1)[:, : n - w].view(k.shape[1], group, -1).sum(1)
            pooled = (
                torch.stack([window[:, max(j - 3, 0) : j + 4].sum(-1) / 7 for j in range(max(n - w, 0))], 1)
                if n > w
                else window
            )
            self._retain(alive, k, v, pooled, min(n, max(int(total * self.rates[1]), w)), w)
            count = max(int(total * self.rates[0]), w)
            if layer == self.tsp_idx and n > count:
                rows = torch.tensor(_top(pooled.sum(0), count - w) + list(range(n - w, n)))
                x, alive = x[rows], alive[rows]
        self.next = total
        return self.model.head(x[-1:])[0]

    def _retain(self, alive: Tensor, k: Tensor, v: Tensor, pooled: Tensor, capacity: int, w: int) -> None:
        n = len(alive)
        picks = [
            list(range(n)) if n <= capacity else _top(head, capacity - w) + list(range(n - w, n)) for head in pooled
        ]
        self.k.append([k[pick, h] for h, pick in enumerate(picks)])
        self.v.append([v[pick, h] for h, pick in enumerate(picks)])
        self.tok.append([alive[pick].tolist() for pick in picks])

    def decode(self, token: int) -> Tensor:
        """Logits of one token more, which reads what was kept and what was generated."""
        x = self.model.embed(torch.tensor([token]))
        for layer in range(self.model.config.num_layers):
            q, k, v = self.model.qkv(layer, x, *self.model.rope(torch.tensor([self.next])))
            heads = range(k.shape[1])
            for h in heads:
                self.k[layer][h] = torch.cat([self.k[layer][h], k[:, h]])
                self.v[layer][h] = torch.cat([self.v[layer][h], v[:, h]])
                self.tok[layer][h] = [*self.tok[layer][h], self.next]
            groups = q[0].view(k.shape[1], -1, q.shape[2])
            mass = [(groups[h] @ self.k[layer][h].T * self.model.scale).softmax(-1) for h in heads]
            self.model.finish(layer, x, torch.cat([mass[h] @ self.v[layer][h] for h in heads])[None])
        self.next += 1
        return self.model.head(x)[0]


def _top(score: Tensor, count: int) -> list[int]:
    order = sorted(range(len(score)), key=lambda j: (-float(score[j]), j))
    return sorted(order[:count])


@pytest.mark.parametrize(("length", "seed"), [(300, 0), (130, 1), (64, 2), (41, 3), (9, 4)])
@pytest.mark.parametrize("rates", [(0.3, 0.2), (0.2, 1), (1, 0.1), (0.1, 0.5)])
@torch.inference_mode()
def test_against_dense_tensors(length: int, seed: int, rates: tuple[float, float]) -> None:
    """Kept sets and logits of the prompt's end and of three generated tokens."""
    engine = method_engine(f"fastkv:tsp_idx=1,tsp_rate={rates[0]},retain_rate={rates[1]}")
    seen = run(engine, prompt(seed, length), 4)
    plain = Plain(engine.machine.model, 1, *rates)
    want = plain.prefill(prompt(seed, length))
    for step in range(4):
        assert seen.kept[step] == plain.tok
        assert torch.allclose(seen.logits[length - 1 + step], want, atol=2e-4)
        want = plain.decode(seen.ids[length + step])


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_any_schedule_keeps_the_same(seed: int) -> None:
    length = [1, 7, 8, 63, 64, 65, 200, 430][seed % 8]
    want = run(method_engine(METHOD), prompt(seed, length), 3)
    assert same_bits(run(method_engine(METHOD, chaos=seed), prompt(seed, length), 3), want)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 300])
def test_off_is_dense_bit_for_bit(length: int) -> None:
    off = run(method_engine("fastkv:tsp_rate=1,retain_rate=1"), prompt(length, length))
    assert same_bits(off, run(method_engine(), prompt(length, length)))


def cells(engine: Engine, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer K and V [Hkv, n, d] of a prompt, before any of them is dropped."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for retention in (part.impl for part in engine.parts if part.seam == "cache"):
        decide = retention.after_layer

        def noted(layer: int, *given: Any, decide: Any = decide) -> Any:
            found[layer] = given[-1].entries()
            return decide(layer, *given)

        retention.after_layer = noted
    seen = begin(engine, ids, 2)
    while not seen.kept:
        engine.step()
    assert seen.live is not None
    held = [seen.live.kv.entries(layer) for layer in range(LAYERS)]
    finish(engine, seen)
    return [found.get(layer, pair) for layer, pair in enumerate(held)]


@pytest.mark.parametrize("retain_rate", [1, 0.1])
def test_cells_up_to_the_cut_are_dense_ones(retain_rate: float) -> None:
    """Bit for bit, the layer of the cut itself too; what is dropped afterwards was there until then."""
    ids = prompt(5, 300)
    dense = cells(method_engine(), ids)
    cut = cells(method_engine(f"fastkv:tsp_idx=2,retain_rate={retain_rate}"), ids)
    assert all(torch.equal(a, b) for layer in range(3) for a, b in zip(cut[layer], dense[layer]))
    assert [k.shape[1] for k, _ in cut] == [300, 300, 300, 60, 60]


@torch.inference_mode()
def test_rows_that_left_are_as_keys_that_nobody_reads() -> None:
    """All rows go on above the cut, but those that it dropped are masked: the prompt's end is the same."""
    ids, row = prompt(5, 300), torch.arange(300)
    engine = method_engine("fastkv:tsp_idx=2,retain_rate=1")
    seen, model = run(engine, ids, 1), engine.machine.model
    alive = torch.isin(row, torch.tensor(seen.kept[0][3][0]))
    causal, x = row <= row[:, None], model.embed(torch.tensor(ids))
    for layer in range(LAYERS):
        sees = causal & (alive | (row == row[:, None])) if layer > 2 else causal
        q, k, v = model.qkv(layer, x, *model.rope(row))
        k, v = (kv.repeat_interleave(q.shape[1] // kv.shape[1], 1) for kv in (k, v))
        scores = torch.einsum("ahd,bhd->hab", q, k) * model.scale
        mass = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        model.finish(layer, x, torch.einsum("hab,bhd->ahd", mass, v))
    assert torch.allclose(seen.logits[299], model.head(x[-1:])[0], atol=2e-4)


def test_each_knob_alone() -> None:
    """Retention leaves the first token alone; the cut leaves the K/V below it alone."""
    ids = prompt(5, 300)
    dense, kept_less, cut = (
        run(method_engine(*methods), ids, 3)
        for methods in ([], ["fastkv:tsp_idx=2,tsp_rate=1,retain_rate=0.1"], ["fastkv:tsp_idx=2,retain_rate=1"])
    )
    assert torch.equal(kept_less.logits[299], dense.logits[299])
    assert not torch.equal(kept_less.logits[300], dense.logits[300])
    assert cut.kept[0][:3] == dense.kept[0][:3]
    assert all(len(head) == 60 for layer in cut.kept[0][3:] for head in layer)
    assert not torch.equal(cut.logits[299], dense.logits[299])


def test_in_a_batch_as_alone() -> None:
    lengths = [300, 64, 9, 150]
    alone = [run(method_engine(METHOD), prompt(n, n), 4) for n in lengths]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        engine = method_engine(METHOD, schedule="sarathi:token_budget=90")
        together = {i: begin(engine, prompt(lengths[i], lengths[i]), 4, f"r{i}") for i in order}
        finish(engine, *together.values())
        assert all(same_bits(together[i], alone[i]) for i in order)


@pytest.mark.parametrize("schedule", ["sarathi", "sarathi:token_budget=70,lift=false"])
def test_memory_is_freed(schedule: str) -> None:
    """At the end each head holds one block more than its count needs at most; counts are as promised."""
    engine = method_engine("fastkv:tsp_idx=1,retain_rate=0.1", schedule=schedule)
    ids, used = prompt(1, 1500), []
    seen = begin(engine, ids, 3)
    while engine.has_work:
        engine.step()
        used.append(engine.pool.used)
    assert seen.live is not None
    block, facts = engine.pool.block_nbytes, report(seen.live, engine.parts)
    needed = LAYERS * 2 * -(-(150 + 2) // BLOCK)
    assert facts["kv"]["bytes_end"] == needed * block and used[-2] == needed
    if "lift" not in schedule:  # one layer of the whole prompt at a time
        assert facts["kv"]["bytes_peak"] <= (needed + 2 * -(-1500 // BLOCK)) * block
    assert facts["cells"]["computed_by_layer"] == [1, 1, 0.2, 0.2, 0.2]
    assert facts["cells"]["computed"] == 2 * 1500 + 3 * 300 and facts["cells"]["absent"] == 3 * 1200
    notes = {part["seam"]: part for part in facts["methods"]}
    assert notes["tokens"]["rows"] == 300 and notes["tokens"]["tsp_idx"] == 1 and notes["cache"]["kept"] == 150
    kv = seen.live.kv
    assert all(len(head) == 150 and head[-8:] == list(range(1492, 1500)) for layer in seen.kept[0] for head in layer)
    assert kv.peak_nbytes == facts["kv"]["bytes_peak"]


def test_cancelled_at_the_barrier_nothing_is_left() -> None:
    """Chunks wait at the barrier; then the request goes. The next one finds everything free."""
    engine = method_engine(METHOD, schedule="sarathi:token_budget=64,lift=false")
    seen = begin(engine, prompt(0, 300), 4)
    while engine.machine.park.count("r", "waiting") < 200:
        engine.step()
    engine.cancel("r")
    finish(engine, seen)
    assert seen.live is not None and seen.live.finish_reason == "cancelled" and not seen.kept
    assert same_bits(run(engine, prompt(0, 300)), run(method_engine(METHOD), prompt(0, 300)))


def test_a_repeated_token_and_a_hybrid() -> None:
    """All scores equal: the window and the lowest ordinals. On gemma3 the layers with windows keep what they had."""
    seen = run(method_engine("fastkv:tsp_idx=1,retain_rate=0.1,tsp_rate=0.2"), [7] * 300, 2)
    assert all(len(head) == 30 and head[-8:] == list(range(292, 300)) for layer in seen.kept[0] for head in layer)
    engine = tiny_engine("gemma3", 3, method=["fastkv:tsp_rate=0.5"], deterministic=True, prefix_cache="off")
    hybrid = run(engine, prompt(0, 300), 2)
    assert [len(layer[0]) for layer in hybrid.kept[0]] == [300, 300, 30]
