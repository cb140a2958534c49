"""What `firstlight inspect` saw of a prefill against what is known of it: planted plans, the engine's own counts."""

from __future__ import annotations

import base64
import json
import os
import sys
import zlib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from firstlight.attention.grid import Grid
from firstlight.cli.inspect_page import page
from firstlight.cli.main import call
from firstlight.core import registry
from firstlight.core.attn import DENSE, AttnPlan, PlanContext, Planner
from firstlight.core.parts import Capability
from firstlight.core.request import SamplingParams
from firstlight.evaluate.inspection import inspect
from firstlight.llm import LLM
from tests.tiny import save_tiny

LENGTH = 300
LAYERS, HEADS = 2, 4
KINDS = ("dense", "listed", "band", "columns")


@dataclass(frozen=True)
class NoSettings:
    pass


class Planted(Planner):
    """Head 0 dense, head 1 a band, head 2 the blocks 0 and 2, head 3 two columns; layer 1 is dense."""

    Config = NoSettings
    capability: ClassVar = Capability(exact=False, chunk_invariant=True)

    def __init__(self, config: NoSettings) -> None:
        pass

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        if ctx.layer == 1:
            return None
        grid = Grid(ctx, 64, 64)
        blocks = torch.zeros(HEADS, grid.tiles, grid.num_blocks, dtype=torch.bool)
        blocks[2, :, ::2] = True
        columns = torch.zeros(HEADS, grid.tiles, grid.num_entries, dtype=torch.bool)
        columns[3, :, [3, 250]] = True
        band = torch.zeros(HEADS, grid.tiles, 2, dtype=torch.int32)
        band[0], band[1], band[3] = torch.tensor([0, DENSE]), torch.tensor([8, 40]), torch.tensor([0, 1])
        return grid.plan(blocks, columns, band)


def visible() -> Tensor:
    """bool [kinds, heads, rows, keys]: the same, written down."""
    row, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    made = torch.zeros(len(KINDS), HEADS, LENGTH, LENGTH, dtype=torch.bool)
    made[0, 0] = True
    made[1, 2] = (key // 64 % 2 == 0).expand(LENGTH, -1)
    made[2, 1] = (key < 8) | (row - key < 40)
    made[2, 3] = row == key
    made[3, 3] = ((key == 3) | (key == 250)) & (row != key)
    return made & (key <= row)


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115, PTH123


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    known = registry._entries()
    entry = SimpleNamespace(load=lambda: Planted)
    monkeypatch.setattr(registry, "_entries", lambda: known | {"planted": {"attention": entry}})
    return save_tiny(tmp_path)


def seen(folder: Path, *methods: str, length: int = LENGTH, **options: Any) -> dict[str, Any]:
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    with LLM(folder, method=list(methods), precision="f32", **options) as llm:
        return inspect(llm, ids)


def unpacked(text: str, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8).view(shape).long()


@pytest.mark.parametrize("schedule", ["sarathi", "sarathi:token_budget=70"])
def test_a_planted_plan_is_seen_as_it_is(folder: Path, schedule: str) -> None:
    found = seen(folder, "planted", schedule=schedule)
    pairs = LENGTH * (LENGTH + 1) / 2
    want = visible().sum((0, 2, 3)) / pairs
    assert torch.tensor(found["density"]) == pytest.approx(torch.stack([want, torch.ones(HEADS)]), abs=1e-4)
    mean = torch.tensor(found["density"]).mean().item()
    assert mean == pytest.approx(found["report"]["attention"]["density"], abs=1e-4)
    cell, num = found["grid"]["cell"], found["grid"]["num"]
    band = torch.arange(LENGTH) // cell
    cells = torch.zeros(len(KINDS), HEADS, num, num).index_put_(
        (*torch.meshgrid(torch.arange(len(KINDS)), torch.arange(HEADS), band, band, indexing="ij"),),
        visible().float(),
        accumulate=True,
    )
    drawn = unpacked(found["plan"], LAYERS, HEADS, num, num)[0]
    assert torch.equal(drawn > 0, cells.sum(0) > 0)
    assert torch.equal((drawn // 64)[drawn > 0], cells.argmax(0)[drawn > 0])


def test_attention_is_dense_attention_and_kept_is_its_share_on_the_plan(folder: Path) -> None:
    planted, dense = seen(folder, "planted"), seen(folder)
    num = dense["grid"]["num"]
    assert torch.tensor(dense["kept"]) == pytest.approx(torch.ones(LAYERS, HEADS), abs=1e-3)
    kept = torch.tensor(planted["kept"])[0]
    assert kept[0] == pytest.approx(1, abs=1e-3) and (kept[1:] < 0.95).all()
    mass = (unpacked(dense["attention"], LAYERS, HEADS, num, num) / 255) ** 2
    assert torch.equal(mass, mass.tril()) and mass.sum(-1).mean() == pytest.approx(1, abs=0.02)
    first = unpacked(planted["attention"], LAYERS, HEADS, num, num)[0]
    assert torch.equal(first, unpacked(dense["attention"], LAYERS, HEADS, num, num)[0])


@pytest.mark.parametrize("method", ["planted", "fastkv:tsp_idx=0", "lazyllm:boundaries=0,keep=0.6"])
def test_cells_and_times_are_those_of_the_report(folder: Path, method: str) -> None:
    found = seen(folder, method)
    report, num = found["report"], found["grid"]["num"]
    shares = unpacked(found["cells"], LAYERS, 3, num) / 255
    sizes = torch.bincount(torch.arange(LENGTH) // found["grid"]["cell"])
    counts = (shares * sizes).sum((0, 2))
    want = [report["cells"][state] for state in ("reused", "computed", "parked")]
    assert counts.tolist() == pytest.approx(want, abs=4)
    assert all(value >= 0 for row in found["seconds"] for value in row)
    spent = sum(map(sum, found["seconds"]))
    assert 0 < spent < report["timings"]["prefill_s"]


def test_what_the_prefix_cache_gave_is_reused(folder: Path) -> None:
    with LLM(folder, precision="f32") as llm:
        llm.generate(list(range(200)), SamplingParams(max_tokens=1))
        found = inspect(llm, [*range(200), *range(100)])
    cells, num = found["report"]["cells"], found["grid"]["num"]
    shares = unpacked(found["cells"], LAYERS, 3, num) / 255
    held = cells["reused"] / cells["total"]
    assert 0.5 < held < 0.7 and shares[:, 0].mean() == pytest.approx(held, abs=0.02)
    assert shares[:, 1].mean() == pytest.approx(1 - held, abs=0.02)
    assert torch.tensor(found["density"]).mean() == pytest.approx(found["report"]["attention"]["density"])
    drawn = unpacked(found["plan"], LAYERS, HEADS, num, num)
    assert not drawn[:, :, : int(held * num) - 1].any() and drawn[:, :, -1].all()


class Page(HTMLParser):
    """Checks that tags close, and takes the data out."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.data, self.text, self.outside = "", "", []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag if ("id", "data") not in attrs else "data")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "data")

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "data":
            self.data += text
        elif self.open and self.open[-1] not in ("script", "style"):
            self.text += text


def test_the_page_holds_what_was_seen_and_nothing_from_elsewhere(folder: Path) -> None:
    found = seen(folder, "planted")
    read = Page()
    read.feed(page(found | {"model": "</script><b>"}, ["notes & more.txt"]))
    assert read.open == [] and read.outside == [] and "{{" not in read.text
    data = json.loads(read.data)
    assert data["density"] == found["density"] and data["plan"] == found["plan"]
    assert f"{found['report']['attention']['density']:.1%}" in read.text
    for said in ("planted (attention)", "300 tokens", "notes & more.txt", "used", "computed"):
        assert said in read.text


def test_the_command_writes_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("A line of text. " * 20)
    line = ["inspect", str(folder), "-f", str(text), "--raw", "-o", str(out), "--method", "band:sink=8,window=40"]
    assert call(line) == 0
    said = capsys.readouterr()
    assert "320 tokens" in said.out and "approximate: band" in said.err and out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "said"), [(None, "can't read"), ("", "the prompt is empty"), ("word " * 2000, "tokens")]
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
    line = ["inspect", str(folder), "-f", str(tmp_path / "text.txt"), "--raw", "-o", str(tmp_path / "page.html")]
    assert call(line) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "page.html").exists()
