"""`duoattention` from prompt to token: any chunk gives the same bits, memory is freed while the prompt runs."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from firstlight import LLM, SamplingParams
from firstlight.core.files import shipped
from firstlight.core.request import Request
from firstlight.engine import build
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.engine.report import report
from firstlight.train.trunk import Trunk
from tests.path.test_engine_mixes import COLUMN, Counted, mix
from tests.tiny import VOCABULARY, tiny_config, tiny_engine, tiny_weights

SINK, RECENT = 48, 70
STREAMS = [[False, True], [True, True], [False, False]]
"""Which KV heads of the three layers stream at a ratio of a half."""
IDS = [i * i % VOCABULARY for i in range(400)]


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gates") / "full_attention_heads.tsv"
    path.write_text("\n".join("\t".join(str(float(not streams)) for streams in row) for row in STREAMS))
    return str(path)


def engine(gates: str, settings: str = "", chunk: int = 1024, **options: object) -> Engine:
    method = f'duoattention:calibration="{gates}",sink={SINK},recent={RECENT}{settings}'
    made = tiny_engine(num_layers=3, **({"method": [method], "deterministic": True} | options))
    made.admission._chunk = chunk
    return made


def ask(made: Engine, ids: list[int] = IDS, new: int = 40) -> tuple[LiveRequest, Tensor]:
    """All rows' logits [T + new - 1, vocabulary]."""
    rows = torch.full((len(ids) + new - 1, VOCABULARY), torch.nan)
    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    sample = made._sample

    def watched(lives, work):  # type: ignore[no-untyped-def]
        for live in lives:
            rows[live.num_known - 1] = work.logits[live.rid]
        return sample(lives, work)

    made._sample = watched  # type: ignore[method-assign]
    live = made.add(Request("r", ids, sampling, logits_at="all", logits_sink=rows.__setitem__))
    while made.has_work:
        made.step()
        made.pool.check()
    assert made.pool.used == 0 and made.pool.reserved == 0
    return live, rows


def by_hand(sees: Callable[[int, int], Tensor], ids: list[int]) -> Tensor:
    """Logits of a plain forward pass in which head h of layer l reads `sees(l, h)` bool [N, N]."""
    config, weights = tiny_config(3), tiny_weights(num_layers=3)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.stack([sees(layer, head // 3) for head in range(6)])
        return scaled_dot_product_attention(q, k, v, mask[None], enable_gqa=True)

    return Trunk(config, weights).hidden(torch.tensor(ids), attend) @ weights["model.embed_tokens.weight"].T


@pytest.mark.parametrize(("mode", "chunk"), [("strict", 197), ("reference", 197), ("reference", 30)])
def test_logits_are_those_of_a_plain_pass_with_the_cards_masks(gates: str, mode: str, chunk: int) -> None:
    """At 197 the first token before the second chunk that its rows read is the last of a block.

    At 30 a chunk, and what its rows read before it, lie within the first tokens, or overlap them.
    """
    live, got = ask(engine(gates, f",mode={mode}", chunk))
    ids = live.ids[:-1]
    row, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    near = (key < SINK) | (row - key < RECENT)
    if mode == "reference":
        begin = torch.where(row < len(IDS), row // chunk * chunk, row)
        near = near | ((row < len(IDS)) & (key >= begin - RECENT))
    want = by_hand(lambda layer, head: (key <= row) & (near | (not STREAMS[layer][head])), ids)
    assert (got - want).abs().max() < 2e-3
    dense = by_hand(lambda layer, head: key <= row, ids)
    assert (got - dense).abs().max() > 0.1, "the mask is real"


def test_all_heads_may_stream(gates: str) -> None:
    """Then nobody reads the middle, in any layer."""
    live, got = ask(engine(gates, ",streaming_ratio=1", 197))
    row, key = torch.arange(len(got))[:, None], torch.arange(len(got))
    sees = (key <= row) & ((key < SINK) | (row - key < RECENT))
    assert (got - by_hand(lambda layer, head: sees, live.ids[:-1])).abs().max() < 2e-3


def test_every_chunk_gives_the_same_bits(gates: str) -> None:
    whole = ask(engine(gates))[1]
    for chunk in (1, 17, 256, len(IDS) - 1):
        assert torch.equal(ask(engine(gates, chunk=chunk))[1], whole)


@pytest.mark.parametrize("settings", [",streaming_ratio=0", ",recent=400"])
def test_identity_settings_are_dense(gates: str, settings: str) -> None:
    method = f'duoattention:calibration="{gates}"{settings}'
    assert torch.equal(ask(engine(gates, method=[method]))[1], ask(engine(gates, method=[]))[1])


def test_a_first_chunk_in_reference_mode_is_dense(gates: str) -> None:
    """As published: only the cache is pruned, which the answer shows."""
    got, dense = ask(engine(gates, ",mode=reference"))[1], ask(engine(gates, method=[]))[1]
    assert (got[: len(IDS)] - dense[: len(IDS)]).abs().max() < 1e-3
    assert (got[len(IDS)] - dense[len(IDS)]).abs().max() > 0.01


@pytest.mark.parametrize("length", [1, 20, 48, 100, 117, 118, 119, 200])
def test_short_prompts_count_no_key_twice(gates: str, length: int) -> None:
    """Shorter than the sink, between sink and sink + recent, and just beyond, with answers that go on from there."""
    live, got = ask(engine(gates), IDS[:length], 90)
    row, key = torch.arange(length + 89)[:, None], torch.arange(length + 89)
    near = (key < SINK) | (row - key < RECENT)
    want = by_hand(lambda layer, head: (key <= row) & (near | (not STREAMS[layer][head])), live.ids[:-1])
    assert (got - want).abs().max() < 2e-3


@pytest.mark.parametrize("sink", [48, 64, 100])
def test_pruned_blocks_change_no_bit(gates: str, sink: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first tokens fill a block, or end inside the second."""
    pruned, got = ask(engine(gates, f",sink={sink}", 100))
    whole = build.make_parts
    monkeypatch.setattr(build, "make_parts", lambda *given: [p for p in whole(*given) if p.seam == "attention"])
    full, want = ask(engine(gates, f",sink={sink}", 100))
    assert torch.equal(got, want)
    columns = -(-(len(IDS) + 39) // 64)
    block = COLUMN // 4
    assert full.kv_end == 6 * columns * block
    first = -(-sink // 64)
    assert pruned.kv_end == (3 * columns + 3 * (first + 2)) * block, "of a streaming head the sink and two blocks stay"


def test_memory_is_free_while_the_prompt_runs(gates: str) -> None:
    """A pool that could not hold the dense cells runs it, and says what it held."""
    ids = [i * 7 % VOCABULARY for i in range(4000)]
    dense = 6 * 63 * COLUMN // 4
    made = engine(gates, kv_memory=str(int(0.75 * dense)))
    kv = report(ask(made, ids, 3)[0], [])["kv"]
    # Half of the heads keep all; of the widest layer two heads have a chunk of 1,024 beside what stays.
    assert kv["bytes_peak"] <= (3 * 63 + 3 * 4 + 2 * 16) * COLUMN // 4 < 0.63 * dense
    assert kv["bytes_end"] <= (3 * 63 + 3 * 3) * COLUMN // 4


def resident(tensor: Tensor) -> int:
    """Bytes of a tensor that the process has in memory: its pages as the kernel counts them."""
    page = os.sysconf("SC_PAGESIZE")
    first, last = tensor.data_ptr() // page, -(-(tensor.data_ptr() + tensor.nbytes) // page)
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * (last - first)), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * page


def held(gates: str, settings: str | None) -> tuple[int, int, int]:
    """Bytes of K/V: at most by the report, and in memory before and after.

    For a process of its own: in an old one malloc may hand out what somebody else has touched.
    """
    set_thp_disable = 41  # or a page of 2 MB would count as touched where 8 KB were
    ctypes.CDLL(None).prctl(set_thp_disable, 1, 0, 0, 0)
    options = {"method": []} if settings is None else {}
    made = engine(gates, settings or "", kv_memory="256MB", **options)
    before = resident(made.pool.layout.k) + resident(made.pool.layout.v)
    peak = report(ask(made, [i * 7 % VOCABULARY for i in range(4000)], 3)[0], [])["kv"]["bytes_peak"]
    return peak, before, resident(made.pool.layout.k) + resident(made.pool.layout.v)


@pytest.mark.parametrize("settings", [None, "", ",streaming_ratio=1"])
def test_the_process_holds_no_more_than_the_pool_says(gates: str, settings: str | None) -> None:
    block = COLUMN // 4
    with multiprocessing.get_context("spawn").Pool(1) as process:
        peak, before, after = process.apply(held, (gates, settings))
    assert before <= 4 * os.sysconf("SC_PAGESIZE"), "memory is taken when it is written to"
    assert peak == 6 * 63 * block if settings is None else peak < 0.63 * 6 * 63 * block
    assert 0.9 * peak <= after - before <= peak + 2 * block


@pytest.mark.parametrize("settings", ["", ",mode=reference", ",streaming_ratio=1"])
def test_random_mixes_with_cancels_leave_nothing(gates: str, settings: str) -> None:
    """In a pool that preempts: answers are computed again, in one pass, and nothing takes more than it was promised."""
    counted = Counted()
    for columns in (4, 12):
        made = engine(gates, settings, 16, kv_memory=str(columns * COLUMN * 3 // 2), schedule="sarathi:token_budget=16")
        counted.watch(made)
        for seed in range(15):
            counted.ends += mix(made, seed).values()
    assert counted.ends.count("length") > 20 and (counted.num_preempted or settings)


@functools.cache
def _passkey_prompt() -> str:
    words = shipped("evaluate/texts/moby-dick-chapter-87.txt").split()[:600]
    words.insert(200, "\nThe passkey to the vault is 41873. Remember it.\n")
    return " ".join(words) + "\n\nThe passkey to the vault is"


def test_a_passkey_in_the_middle_is_lost_when_all_heads_stream(smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "any.tsv").write_text("0\t0\t0\n" * 30)

    def answer(*method: str) -> str:
        with LLM(str(smollm2_path), method=list(method), max_model_len=2048) as llm:
            return llm.generate(_passkey_prompt(), SamplingParams(max_tokens=8))[0].text

    all_stream = f"duoattention:calibration={tmp_path / 'any.tsv'},streaming_ratio=1"
    assert "41873" in answer() and "41873" not in answer(all_stream)
