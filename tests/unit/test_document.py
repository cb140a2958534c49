"""A document's file: what is written comes back, and whatever else is in a file gets one line."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import tempfile
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.kernels.kv_layout import KVLayout
from firstlight.reuse.document import FORMAT, MAGIC, Origin, read_document, write_document

LAYERS, HEADS, HEAD_DIM = 2, 3, 4
NBYTES = KVLayout.block_nbytes(HEAD_DIM, torch.bfloat16)
ORIGIN = Origin("tiny", "ab" * 32, "bfloat16", "", "exact", KVLayout.tag, (LAYERS, HEADS, NBYTES))
START = 16


def a_layout(blocks: int, dtype: torch.dtype = torch.bfloat16) -> KVLayout:
    """Of random bytes, but for the zero block."""
    layout = KVLayout(blocks + 1, HEAD_DIM, dtype)
    rng = np.random.default_rng(blocks)
    nbytes = KVLayout.block_nbytes(HEAD_DIM, dtype)
    layout.restore(torch.arange(1, blocks + 1), rng.integers(0, 256, (blocks, nbytes), np.uint8))
    return layout


def written(path: Path, tokens: int = 150, origin: Origin = ORIGIN) -> tuple[Path, KVLayout, np.ndarray]:
    """A document in random blocks."""
    columns = -(-tokens // 64)
    layout = a_layout(LAYERS * HEADS * columns)
    order = np.random.default_rng(1).permutation(LAYERS * HEADS * columns) + 1
    table = order.reshape(LAYERS, HEADS, columns).astype(np.int32)
    write_document(path, origin, list(range(tokens)), True, table, layout)
    return path, layout, table


def refused(path: Path, expected: Origin = ORIGIN) -> str:
    with pytest.raises(UserError) as caught:
        read_document(path, expected)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(1, 200), gone=st.floats(0, 1), seed=st.integers(0, 100))
def test_what_is_written_comes_back(tmp_path: Path, dtype: torch.dtype, tokens: int, gone: float, seed: int) -> None:
    """Into other blocks, and without the blocks that a layer had let go."""
    rng, columns = np.random.default_rng(seed), -(-tokens // 64)
    shape = (LAYERS, HEADS, columns)
    count = LAYERS * HEADS * columns
    layout = a_layout(count, dtype)
    table = (rng.permutation(count) + 1).reshape(shape).astype(np.int32)
    table[(rng.random(shape) < gone) & (table > 1)] = 0
    origin = replace(ORIGIN, shape=(LAYERS, HEADS, KVLayout.block_nbytes(HEAD_DIM, dtype)))
    write_document(tmp_path / "doc", origin, list(range(tokens)), tokens % 2 == 0, table, layout)

    stored = read_document(tmp_path / "doc", origin)
    assert stored.ids.tolist() == list(range(tokens)) and stored.is_chat == (tokens % 2 == 0)
    assert np.array_equal(stored.held, table > 0)
    other, target = KVLayout(count + 1, HEAD_DIM, dtype), np.zeros(shape, np.int32)
    target[stored.held] = rng.permutation(count)[: np.count_nonzero(stored.held)] + 1
    stored.fill(other, target)
    old, new = (torch.from_numpy(t[stored.held].astype(np.int64)) for t in (table, target))
    assert np.array_equal(layout.export(old), other.export(new))


def test_a_file_is_as_large_as_its_cells(tmp_path: Path) -> None:
    """Blocks of a usual size: a head and ids are less than a hundredth."""
    layout = KVLayout(LAYERS * HEADS * 20 + 1, 64, torch.bfloat16)
    table = np.arange(1, LAYERS * HEADS * 20 + 1, dtype=np.int32).reshape(LAYERS, HEADS, 20)
    nbytes = KVLayout.block_nbytes(64, torch.bfloat16)
    origin = replace(ORIGIN, shape=(LAYERS, HEADS, nbytes))
    write_document(tmp_path / "doc", origin, [1] * 1280, True, table, layout)
    assert table.size * nbytes < (tmp_path / "doc").stat().st_size < 1.01 * table.size * nbytes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"digest": "cd" * 32, "model": "other"}, r"prefilled with tiny \(sha256 abab.*this is other \(sha256 cdcd"),
        ({"shape": (LAYERS + 1, HEADS, NBYTES)}, "prefilled with tiny"),
        ({"dtype": "float32"}, r"another precision \(bfloat16, this is float32\)"),
        ({"methods": "band:sink=4", "recipe": "x"}, r"another method \(exact, this is band:sink=4\)"),
        ({"layout": "packed"}, rf"another K/V layout \({KVLayout.tag}, this is packed\)"),
        ({"recipe": "x"}, "other cells"),
    ],
)
def test_it_belongs_to_one_model_type_and_recipe(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path, *_ = written(tmp_path / "doc")
    with pytest.raises(UserError, match=says):
        read_document(path, replace(ORIGIN, **change))


def test_what_is_no_document_gets_one_line(tmp_path: Path) -> None:
    path = tmp_path / "doc"
    assert "can't read" in refused(path)
    path.mkdir()
    assert "no regular file" in refused(path)
    path.rmdir()
    os.mkfifo(path)
    assert "no regular file" in refused(path)
    path.unlink()
    for content, says in [
        (b"", "is empty"),
        (b"GGUF", "no prefilled document"),
        (b"x" * 5000, "no prefilled document"),
        (MAGIC, "cut off"),
        (MAGIC + struct.pack("<II", FORMAT + 1, 0), f"has format {FORMAT + 1}, this version reads {FORMAT}"),
        (MAGIC + struct.pack("<II", 0, 0), "damaged"),
        (MAGIC + struct.pack("<II", FORMAT, 2**32 - 1), "damaged"),
    ]:
        path.write_bytes(content)
        assert says in refused(path)


def test_a_file_that_can_not_be_written_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file/doc", "x" * 300):
        with pytest.raises(UserError, match="can't write") as caught:
            written(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_half_written_file_never_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *_ = written(tmp_path / "doc")
    before = path.read_bytes()
    calls = iter(range(100))
    export = KVLayout.export

    def fail(self: KVLayout, blocks: torch.Tensor) -> Any:
        if next(calls) == 0:
            return export(self, blocks[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KVLayout, "export", fail)
    monkeypatch.setattr("firstlight.reuse.document._GROUP", 1)
    with pytest.raises(UserError, match="No space left on device"):
        written(path, tokens=200)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@functools.cache
def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return written(Path(folder) / "doc")[0].read_bytes()


def small(path: Path, content: bytes) -> str:
    """Refused, and at no moment was there more memory in use than the file is large, and a little."""
    path.write_bytes(content)
    tracemalloc.start()
    says = refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(content) + (1 << 20), f"{peak} bytes for a file of {len(content)}"
    return says


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_cut_off_anywhere(tmp_path: Path, share: float) -> None:
    small(tmp_path / "doc", whole()[: int(share * len(whole()))])


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), near_start=st.booleans(), bit=st.integers(0, 7))
def test_any_flipped_bit_shows(tmp_path: Path, place: float, near_start: bool, bit: int) -> None:
    damaged = bytearray(whole())
    damaged[int(place * (600 if near_start else len(damaged)))] ^= 1 << bit
    small(tmp_path / "doc", bytes(damaged))


NUMBERS = st.sampled_from([2**63 - 1, 2**63, 2**64, -1, 0, 2**31, 2**31 - 1, 10**30, True, 1.5, "3", None, [1], {}])
VALUES = NUMBERS | st.integers(-(2**70), 2**70) | st.lists(NUMBERS, max_size=4) | st.text(max_size=5)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([*asdict(ORIGIN), "num_tokens", "chat"]),
    value=VALUES | st.lists(st.sampled_from([1, 2, 3, 2**40]), min_size=3, max_size=3),
    drop=st.booleans(),
)
def test_heads_that_lie(tmp_path: Path, key: str, value: Any, drop: bool) -> None:
    """With a checksum that agrees, so that nothing but the checks of the values stands in the way."""
    length = int.from_bytes(whole()[12:16], "little")
    head = json.loads(whole()[START : START + length])
    honest = dict(head)
    head = {k: v for k, v in head.items() if k != key} if drop else head | {key: value}
    harmless = key == "model" or (key == "chat" and isinstance(value, bool))
    if head == honest or (harmless and not drop):
        return
    text = json.dumps(head).encode()
    text += b" " * max(length - len(text), 0)
    rest = whole()[START + length : -32]
    before = MAGIC + struct.pack("<II", FORMAT, len(text)) + text + rest[: -18 * NBYTES]
    blocks = np.frombuffer(rest[-18 * NBYTES :], "<u8").reshape(18, -1)
    sums = blocks.sum(axis=1, dtype=np.uint64).tobytes()
    small(tmp_path / "doc", before + rest[-18 * NBYTES :] + hashlib.sha256(before + sums).digest())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), start=st.booleans())
def test_any_bytes(tmp_path: Path, content: bytes, start: bool) -> None:
    small(tmp_path / "doc", (MAGIC + struct.pack("<II", FORMAT, 64) if start else b"") + content)
