"""`lazyllm` in the engine: against plain dense tensors, its invariants at every step, preempted, cancelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight import LLM
from firstlight.core.config import Options
from firstlight.core.files import shipped
from firstlight.core.parts import PromptIds
from firstlight.engine.build import build_engine
from firstlight.engine.engine import Engine
from firstlight.engine.report import report
from firstlight.evaluate.asking import ask, likeliest
from firstlight.evaluate.chaos import Chaos
from firstlight.models.decoder import Decoder
from tests.path.method_runs import Seen, begin, finish, method_engine, prompt, run, same_bits
from tests.tiny import tiny_config, tiny_engine, tiny_weights

LAYERS = 6
METHOD = "lazyllm:boundaries=1;3,keep=0.6;0.5"


class Plain:
    """LazyLLM as its pseudo-code has it: a dictionary of K/V for each layer, and one of rows that wait."""

    def __init__(self, model: Decoder, keep: dict[int, float]) -> None:
        self.model, self.keep = model, keep
        self.k: list[dict[int, Tensor]] = [{} for _ in range(model.config.num_layers)]
        self.v: list[dict[int, Tensor]] = [{} for _ in range(model.config.num_layers)]
        self.aux: dict[int, tuple[int, Tensor]] = {}
        """Token -> the layer that it would enter next, and its row."""
        self.computed = [0] * model.config.num_layers
        self.length = 0

    def step(self, ids: list[int]) -> Tensor:
        """The prompt, or one token more: logits of the last row."""
        first = self.length
        self.length += len(ids)
        self.prompt = self.prompt if first else len(ids)
        embedded = self.model.embed(torch.tensor(ids))
        rows = {first + i: embedded[i : i + 1] for i in range(len(ids))}
        chosen = list(range(self.length))
        for layer in range(self.model.config.num_layers):
            for tok in chosen:
                if tok not in self.k[layer] and tok not in rows:
                    at, rows[tok] = self.aux.pop(tok)
                    assert at == layer, "a row resumes where it stopped"
            mass = self._layer(layer, rows, chosen)
            if layer in self.keep and layer < self.model.config.num_layers - 1:
                chosen = self._choose(chosen, mass, self.keep[layer])
                for tok in [tok for tok in rows if tok not in chosen]:
                    self.aux[tok] = (layer + 1, rows.pop(tok))
        return self.model.head(rows[self.length - 1])[0]

    def _layer(self, layer: int, rows: dict[int, Tensor], chosen: list[int]) -> Tensor:
        """Rows go through a layer, reading what is chosen; the last one's attention [Hq, chosen]."""
        toks = sorted(rows)
        x = torch.cat([rows[tok] for tok in toks])
        q, k, v = self.model.qkv(layer, x, *self.model.rope(torch.tensor(toks)))
        for i, tok in enumerate(toks):
            assert tok not in self.k[layer], "each token is computed once in a layer"
            self.k[layer][tok], self.v[layer][tok] = k[i], v[i]
            self.computed[layer] += 1
        group = q.shape[1] // k.shape[1]
        keys, values = (
            torch.stack([held[layer][tok] for tok in chosen]).repeat_interleave(group, 1) for held in (self.k, self.v)
        )
        behind = torch.tensor(toks)[:, None] - torch.tensor(chosen)
        hidden = (behind < 0) | (behind >= (self.model.windows[layer] or self.length))
        scores = torch.einsum("ahd,bhd->hab", q, keys) * self.model.scale
        if (cap := self.model.config.score_cap) is not None:
            scores = cap * torch.tanh(scores / cap)
        mass = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        self.model.finish(layer, x, torch.einsum("hab,bhd->ahd", mass, values))
        rows |= {tok: x[i : i + 1] for i, tok in enumerate(toks)}
        return mass[:, -1]

    def _choose(self, chosen: list[int], mass: Tensor, share: float) -> list[int]:
        score = dict(zip(chosen, mass.mean(0).tolist()))
        always = {tok for tok in chosen if tok < 4 or tok >= self.prompt - 1}
        ranked = sorted(chosen, key=lambda tok: (tok not in always, -score[tok], tok))
        return sorted(ranked[: max(math.ceil(share * len(chosen)), len(always))])

    def kept(self) -> list[list[int]]:
        return [sorted(layer) for layer in self.k]

    def parked(self) -> list[list[int]]:
        return [sorted(t for t, (at, _) in self.aux.items() if at == layer) for layer in range(len(self.k))]


def plain_run(seen: Seen, model: Decoder, length: int, keep: dict[int, float]) -> Plain:
    """The same tokens through the plain form, compared with what was seen at every token."""
    plain = Plain(model, keep)
    given = seen.ids[:length]
    for step in range(len(seen.ids) - length):
        want = plain.step(given)
        assert [layer[0] for layer in seen.kept[step]] == plain.kept()
        assert all(layer[0] == layer[1] for layer in seen.kept[step])
        assert seen.parked[step] == plain.parked()
        assert torch.allclose(seen.logits[plain.length - 1], want, atol=2e-4)
        given = [seen.ids[length + step]]
    return plain


@pytest.mark.parametrize(("length", "seed"), [(150, 0), (65, 1), (20, 2), (5, 3), (2, 4), (1, 5)])
@torch.inference_mode()
def test_against_dense_tensors(length: int, seed: int) -> None:
    engine = method_engine(METHOD, layers=LAYERS)
    seen = run(engine, prompt(seed, length), 8)
    plain = plain_run(seen, engine.machine.model, length, {1: 0.6, 3: 0.5})
    assert seen.live is not None
    generated = [7] * LAYERS
    assert [a + b for a, b in zip(seen.live.computed, generated)] == plain.computed
    facts = report(seen.live, engine.parts)
    assert facts["cells"]["computed"] + facts["cells"]["parked"] == facts["cells"]["total"] == length * LAYERS
    assert facts["cells"]["absent"] == 0


@pytest.mark.parametrize(
    ("boundaries", "keep"), [("0", {0: 0.6}), ("1;2", {1: 0.6, 2: 0.5}), ("0;1;4", {0: 0.8, 1: 0.7, 4: 0.5})]
)
@pytest.mark.parametrize("length", [150, 65, 5])
@torch.inference_mode()
def test_boundaries_at_the_first_layer_and_side_by_side(boundaries: str, keep: dict[int, float], length: int) -> None:
    shares = ";".join(map(str, keep.values()))
    engine = method_engine(f"lazyllm:boundaries={boundaries},keep={shares}", layers=LAYERS)
    seen = run(engine, prompt(length, length), 6)
    plain_run(seen, engine.machine.model, length, keep)
    assert length == 5 or any(seen.parked[0][layer + 1] for layer in keep)


def hybrid_engine(*methods: str, chaos: int | None = None) -> Engine:
    """Six layers of gemma3, of which 2 and 5 read all tokens."""
    config = replace(tiny_config(LAYERS, "gemma3"), local_layers=(0, 1, 3, 4))
    options = Options(precision="f32", method=methods, deterministic=True, prefix_cache="off", max_num_seqs=8)
    engine = build_engine(config, tiny_weights(num_layers=LAYERS, family="gemma3"), options, "tiny")
    if chaos is not None:
        engine.policy = Chaos(chaos, LAYERS)
    return engine


@pytest.mark.parametrize("length", [200, 64])
@torch.inference_mode()
def test_a_cut_between_window_layers(length: int) -> None:
    """Rows that come back read the window of their own place, whatever was chosen behind it."""
    method, ids = "lazyllm:boundaries=2,keep=0.4", prompt(length, length)
    engine = hybrid_engine(method)
    seen = run(engine, ids, 8)
    plain_run(seen, engine.machine.model, length, {2: 0.4})
    assert len(seen.kept[0][2][0]) == length and len(seen.kept[0][3][0]) == -(-2 * length // 5)
    assert seen.parked[0][3] and len(seen.kept[-1][3][0]) > len(seen.kept[0][3][0]) + 7, "some came back"
    for seed in range(3):
        assert same_bits(run(hybrid_engine(method, chaos=seed), ids, 8), seen)


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_invariants_of_every_step(seed: int) -> None:
    """A token's K/V is a prefix of the layers; one row of it waits, where its K/V ends, unless it is complete."""
    length = 30 + seed % 90
    seen = run(method_engine(METHOD, layers=LAYERS), prompt(seed, length), 6)
    for kept, parked in zip(seen.kept, seen.parked):
        layers = [set(heads[0]) for heads in kept]
        assert all(above <= below for below, above in pairwise(layers))
        for tok in range(length):
            depth = sum(tok in layer for layer in layers)
            waits = [layer for layer, toks in enumerate(parked) if tok in toks]
            assert waits == ([depth] if depth < LAYERS else [])
    assert all(set(a[i][0]) <= set(b[i][0]) for a, b in pairwise(seen.kept) for i in range(LAYERS))


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_any_schedule_does_the_same(seed: int) -> None:
    """Replays after a preemption, too: their rows go one by one, as they came."""
    length = [1, 3, 63, 64, 65, 200, 330][seed % 7]
    want = run(method_engine(METHOD, layers=LAYERS), prompt(seed, length), 5)
    assert same_bits(run(method_engine(METHOD, layers=LAYERS, chaos=seed), prompt(seed, length), 5), want)


def test_a_preempted_request_replays_its_tokens() -> None:
    """A pool too small for two: one is preempted while it decodes, and answers as if it had been alone."""
    prompts = [prompt(n, 100) for n in (1, 2)]
    alone = [run(method_engine(METHOD, layers=LAYERS), ids, 60) for ids in prompts]
    block = 2 * 64 * 16 * 4
    engine = method_engine(METHOD, layers=LAYERS, kv_memory=str(5 * 2 * LAYERS * block))
    both = [begin(engine, ids, 60, f"r{i}") for i, ids in enumerate(prompts)]
    finish(engine, *both)
    assert sum(one.live.num_preempted for one in both if one.live) > 0
    for one, want in zip(both, alone):
        assert one.ids == want.ids and all(torch.equal(one.logits[t], row) for t, row in want.logits.items())
        assert one.live is not None and want.live is not None and one.live.computed == want.live.computed


@pytest.mark.parametrize("length", [1, 4, 63, 64, 65, 200])
def test_off_is_dense_bit_for_bit(length: int) -> None:
    off = run(method_engine("lazyllm:keep=1", layers=LAYERS), prompt(length, length))
    assert same_bits(off, run(method_engine(layers=LAYERS), prompt(length, length)))
    assert not any(toks for step in off.parked for toks in step)
    last = run(method_engine(f"lazyllm:boundaries={LAYERS - 1}", layers=LAYERS), prompt(length, length))
    assert same_bits(last, off), "behind the last layer nobody waits"


@torch.inference_mode()
def test_all_come_back_in_the_first_step_where_decode_keeps_all() -> None:
    engine = method_engine(f"{METHOD},decode_keep=1", layers=LAYERS)
    seen = run(engine, prompt(7, 120), 4)
    assert any(seen.parked[0]) and not any(seen.parked[1])
    assert all(heads[0] == list(range(121)) for heads in seen.kept[1])
    assert seen.live is not None and seen.live.computed == [120] * LAYERS
    notes = report(seen.live, engine.parts)["methods"][0]
    assert notes["revived"] == 120 - len(seen.kept[0][5][0])


def test_without_revival_the_prompt_end_chose_for_good() -> None:
    seen = run(method_engine(f"{METHOD},revive=off", layers=LAYERS), prompt(7, 120), 5)
    assert seen.parked[0] == seen.parked[-1] and any(seen.parked[0])
    assert [len(heads[0]) for heads in seen.kept[0]] == [120, 120, 72, 72, 36, 36]
    assert [len(heads[0]) for heads in seen.kept[-1]] == [124, 124, 76, 76, 40, 40]


def test_in_a_batch_as_alone_and_on_a_hybrid() -> None:
    lengths = [150, 5, 64]
    alone = [run(method_engine(METHOD, layers=LAYERS), prompt(n, n), 5) for n in lengths]
    engine = method_engine(METHOD, layers=LAYERS, schedule="sarathi:token_budget=90")
    together = [begin(engine, prompt(n, n), 5, f"r{n}") for n in lengths]
    finish(engine, *together)
    assert all(same_bits(got, want) for got, want in zip(together, alone))
    engine = tiny_engine("gemma3", 3, method=["lazyllm:boundaries=2"], deterministic=True, prefix_cache="off")
    assert same_bits(
        run(engine, prompt(0, 200)),
        run(tiny_engine("gemma3", 3, deterministic=True, prefix_cache="off"), prompt(0, 200)),
    )


@pytest.mark.parametrize("waiting", [0, 1])
def test_cancelled_at_each_barrier_nothing_is_left(waiting: int) -> None:
    engine = method_engine(METHOD, layers=LAYERS, schedule="sarathi:token_budget=64,lift=false")
    seen = begin(engine, prompt(0, 300), 4)
    layer = (2, 4)[waiting]
    while not len(engine.machine.park.ordinals("r", layer, "waiting")):
        engine.step()
    engine.cancel("r")
    finish(engine, seen)
    assert seen.live is not None and seen.live.finish_reason == "cancelled" and not seen.kept


def test_a_needle_that_is_asked_for_late_comes_back(smollm2_path: Path) -> None:
    """Nothing in the prompt asks for it; from the 20th generated token on it is needed."""
    words = shipped("evaluate/texts/moby-dick-chapter-87.txt").split()[:500]
    words.insert(150, "\nThe passkey to the vault is 41873. Remember it.\n")
    late = (
        " the whales, which swim in great herds through the straits of Sunda. By the way, the passkey to the vault is"
    )

    def answer(*method: str) -> str:
        with LLM(str(smollm2_path), method=list(method), max_model_len=2048) as llm:
            given, ids = llm.encode(late), llm.encode(" ".join(words) + "\n\nThis chapter tells of")
            assert len(given) >= 20

            def choose(generated: Sequence[int], logits: Tensor) -> int:
                return given[len(generated)] if len(generated) < len(given) else likeliest(generated, logits)

            asked = ask(llm.engine, PromptIds(ids), choose, len(given) + 7)
            return llm.tokenizer.decode(asked.token_ids[len(given) :])

    lazy = "lazyllm:boundaries=15,keep=0.1"
    assert "41873" in answer() and "41873" in answer(lazy) and "41873" not in answer(f"{lazy},revive=off")
