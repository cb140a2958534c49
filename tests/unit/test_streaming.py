"""`duoattention` without a model: which heads stream, what their rows see, and how tables of gates are read."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.attention.duoattention import DuoAttention
from firstlight.cache.duoattention import StreamingHeads
from firstlight.core.attn import AttnPlan, PlanContext
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.core.registry import Method, classes, make_parts
from firstlight.core.streaming import StreamingConfig, check_model, lowest, read_table, streaming_heads
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK, KVLayout
from firstlight.kernels.reference.attention import visible_mask

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, HEADS, KV_HEADS = 3, 4, 2
MODEL = ModelFacts("a" * 64, LAYERS, HEADS, KV_HEADS, 8, (None,) * LAYERS)
GATES = [[0.9, 0.1], [0.8, 0.7], [0.0, 0.2]]
"""At a ratio of a half: the second head of layer 0, none of layer 1, both of layer 2."""


def calibration(gates: object = GATES) -> Calibration:
    return Calibration("duoattention", MODEL.digest, {}, {}, {"gates": gates}, "file")


def unread() -> torch.Tensor:
    raise AssertionError("duoattention looks at no key")


def plan(config: StreamingConfig, layer: int, tok: torch.Tensor, prompt_len: int) -> AttnPlan | None:
    planner = DuoAttention(config)
    planner.bind(MODEL, calibration())
    q = torch.zeros(len(tok), HEADS, 8)
    return planner.plan(PlanContext(layer, q, tok, tok, KV_HEADS, prompt_len, True, unread, {}))


def seen(config: StreamingConfig, layer: int, lo: int, hi: int, prompt_len: int) -> torch.Tensor:
    """What rows [lo, hi) see in one pass: bool [hi - lo, HEADS, hi]."""
    tok = torch.arange(lo, hi)
    q = torch.zeros(hi - lo, HEADS, 8)
    table = torch.zeros(KV_HEADS, -(-hi // BLOCK), dtype=torch.int32)
    view, rows = KVView(table, [hi] * KV_HEADS), AttnRows([0, hi - lo], tok, tok, [False])
    call = AttnCall(q, rows, KVLayout(1, 8, q.dtype), [view], q, 1.0, plan(config, layer, tok, prompt_len))
    return torch.cat([visible_mask(call, 0, h, 0, hi - lo) for h in range(KV_HEADS)], 1)


def sees(config: StreamingConfig, streams: bool, row: int, key: int, chunk: int, prompt_len: int) -> bool:
    """The card's words, for one row and key: `chunk` is where the row's chunk begins."""
    if key > row or not streams:
        return key <= row
    if key < config.sink or row - key < config.recent:
        return True
    return config.mode == "reference" and row < prompt_len and key >= chunk - config.recent


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(["strict", "reference"]),
    layer=st.sampled_from([0, 2]),
)
def test_rows_see_what_the_card_says(seed: int, mode: str, layer: int) -> None:
    dice = random.Random(seed)
    config = StreamingConfig(sink=dice.choice([0, 1, 48, 64, 65]), recent=dice.choice([1, 64, 100]), mode=mode)
    prompt_len = dice.randint(config.sink + config.recent + 1, 400)
    lo = dice.choice([0, dice.randrange(prompt_len), dice.randrange(prompt_len), prompt_len])
    hi = lo + 1 if lo == prompt_len else dice.randint(lo + 1, min(prompt_len, lo + 200))
    got = seen(config, layer, lo, hi, prompt_len)
    for head in range(HEADS):
        streams = [[False, True], [False, False], [True, True]][layer][head // 2]
        want = [[sees(config, streams, row, key, lo, prompt_len) for key in range(hi)] for row in range(lo, hi)]
        assert torch.equal(got[:, head], torch.tensor(want))


def test_dense_is_no_plan() -> None:
    """No streaming head in the layer, or a prompt that sink and window hold: whatever the chunk, at any ratio."""
    config = StreamingConfig(sink=10, recent=20)
    assert plan(config, 1, torch.arange(100), 100) is None
    assert plan(config, 2, torch.arange(30), 30) is None and plan(config, 2, torch.arange(8), 31) is not None
    assert plan(config, 2, torch.tensor([29]), 5) is None and plan(config, 2, torch.tensor([30]), 5) is not None
    assert plan(dataclasses.replace(config, streaming_ratio=0.0), 2, torch.arange(100), 100) is None


@given(ratio=st.floats(0, 1), seed=st.integers(0, 5), levels=st.integers(1, 4))
def test_the_lowest_gates_stream_and_dice_decide_among_equals(ratio: float, seed: int, levels: int) -> None:
    dice = random.Random(seed)
    gates = [[dice.randrange(levels) / levels for _ in range(3)] for _ in range(7)]
    chosen = lowest(gates, ratio, seed)
    flat = [(gate, streams) for row, of_row in zip(gates, chosen) for gate, streams in zip(row, of_row)]
    low, high = [g for g, s in flat if s], [g for g, s in flat if not s]
    assert len(low) == round(ratio * 21) and (not low or not high or max(low) <= min(high))
    assert chosen == lowest(gates, ratio, seed)
    assert len({str(lowest([[0.5] * 3] * 7, 0.5, s)) for s in range(5)}) == 5


def test_a_published_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    lines = ["\t".join(f"{gate:.18e}" for gate in row) for row in GATES]
    (tmp_path / "full_attention_heads.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256}')
    for path in (tmp_path, tmp_path / "full_attention_heads.tsv"):
        assert read_table(path) == {"gates": GATES}
        parts = make_parts([Method("duoattention", calibration=str(path))], MODEL)
        assert [part.seam for part in parts] == ["attention", "cache"]
        assert parts[1].impl.streams().heads == [[False, True], [False, False], [True, True]]
    assert read_table(tmp_path / "config.json") is None
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\tmany\n")
    with pytest.raises(UserError, match="no table of gates"):
        read_table(tmp_path)
    with pytest.raises(UserError, match=r"can't read the gates .*missing.tsv"):
        read_table(tmp_path / "missing.tsv")


@pytest.mark.parametrize(
    "gates", [[[1.0, 1.0]], [[1.0]] * 3, [[1.0, 1.0, 1.0]] * 3, [], "no table", [1.0, 2.0, 3.0], [[1.0, "x"]] * 3]
)
def test_gates_of_another_shape_are_refused(gates: object) -> None:
    with pytest.raises(UserError, match="gates"):
        streaming_heads(StreamingConfig(), MODEL, calibration(gates))


def test_models_without_gates_are_refused() -> None:
    with pytest.raises(UserError, match="firstlight calibrate MODEL duoattention"):
        streaming_heads(StreamingConfig(), MODEL, None)
    hybrid = dataclasses.replace(MODEL, num_kv_heads=1, windows=(512, 512, None))
    with pytest.raises(UserError, match=r"among the 1 others of 1 KV head\(s\) gates mean nothing"):
        check_model(hybrid)


@pytest.mark.parametrize(
    ("key", "value"),
    [("streaming_ratio", 1.5), ("streaming_ratio", -0.1), ("sink", -1), ("recent", 0), ("mode", "loose")],
)
def test_bad_settings_name_key_and_value(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key}={value!r}"):
        StreamingConfig(**{key: value})


def test_the_parts_say_what_they_break() -> None:
    assert classes("duoattention") == {"attention": DuoAttention, "cache": StreamingHeads}
    strict, kept = make_parts([Method.parse("duoattention")])
    (reference, _) = make_parts([Method.parse("duoattention:mode=reference")])
    assert strict.capability.chunk == 1024
    assert strict.capability.chunk_invariant and not reference.capability.chunk_invariant
    assert not kept.capability.prefix_stable and not kept.capability.alters_cells
    assert all(field.metadata["doc"] for field in dataclasses.fields(StreamingConfig))
