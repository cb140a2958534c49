"""Int8 KV blocks: what an entry becomes, that its bytes are its own, and that they survive every move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from firstlight.cache.pool import Pool
from firstlight.cache.table import RequestKV
from firstlight.core.config import int8_parts
from firstlight.core.errors import UserError
from firstlight.kernels import kv_layout
from firstlight.kernels.kv_layout import BLOCK, Int8Layout, KVLayout
from tests.tiny import tiny_engine

HEADS = 2


def entries(n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k, v [n, H, D]; K with a few channels that are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, n, HEADS, dim, generator=generator).bfloat16()
    k[:, :, ::16] *= 30
    return k, v


def written(n: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Int8Layout, Tensor, Tensor, Tensor]:
    """A layout with n entries from slot 64 on, head after head; slots i64 [n, H], k, v."""
    layout, (k, v) = Int8Layout(8, dim, dtype), entries(n, dim)
    slots = BLOCK + torch.arange(HEADS)[None] * 3 * BLOCK + torch.arange(n)[:, None]
    layout.write(slots, k.to(dtype), v.to(dtype))
    return layout, slots, k, v


@pytest.mark.parametrize("dim", [16, 48, 64, 128, 256])
def test_what_is_read_is_what_was_written_but_for_rounding(dim: int) -> None:
    layout, slots, k, v = written(100, dim, torch.float32)
    for stored, given in zip(layout.read(slots.view(-1)), (k, v)):
        given = given.reshape(-1, dim).float()
        error = (stored - given).norm(dim=-1) / given.norm(dim=-1)
        assert error.max() < 0.02, "half a step in each of D turned channels"
    table = torch.tensor([[1, 2], [4, 5]], dtype=torch.int32)
    for whole, one in zip(layout.read_blocks(table), layout.read(slots.T.reshape(-1))):
        torch.testing.assert_close(whole[:, :100].reshape(-1, dim), one, rtol=1e-5, atol=1e-5)


def test_python_and_the_kernel_store_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a value that falls on the other side of a half."""
    layout, slots, _, _ = written(70, 64)
    monkeypatch.setattr(kv_layout, "lib", None)
    other = written(70, 64)[0]
    for a, b in zip(layout.lift(slots.view(-1)), other.lift(slots.view(-1))):
        assert (a[:, :-4].int() - b[:, :-4].int()).abs().remainder(255).max() <= 1
        scales = (x[:, -4:].contiguous().view(torch.float32) for x in (a, b))
        torch.testing.assert_close(*scales, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 48, 64, 128, 256])
def test_python_and_the_kernel_read_the_same(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, table = written(100, dim, dtype)[0], torch.tensor([[1, 2], [5, 4]], dtype=torch.int32)
    compiled = layout.read_keys(table)
    monkeypatch.setattr(kv_layout, "lib", None)
    torch.testing.assert_close(
        compiled, layout.read_keys(table), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-6
    )


def test_an_entry_of_zeros_and_a_huge_one() -> None:
    layout = Int8Layout(2, 64, torch.float32)
    k = torch.stack([torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), 1e-30)])[:, None]
    layout.write(torch.arange(BLOCK, BLOCK + 3)[:, None], k, k)
    for stored in layout.read(torch.arange(BLOCK, BLOCK + 3)):
        torch.testing.assert_close(stored, k[:, 0], rtol=0.01, atol=1e-15)


def test_a_block_costs_what_it_holds() -> None:
    layout = Int8Layout(3, 64, torch.bfloat16)
    assert layout.k[0].nbytes + layout.v[0].nbytes == Int8Layout.block_nbytes(64, torch.bfloat16) == 2 * 64 * 68
    assert Pool(2, 64, torch.bfloat16, Int8Layout).block_nbytes == 2 * 64 * 68
    assert Int8Layout.tag != KVLayout.tag


def table_of(n: int) -> tuple[RequestKV, Tensor, Tensor]:
    """A request of one layer that holds n entries."""
    kv, (k, v) = RequestKV(Pool(20, 64, torch.bfloat16, Int8Layout), 1, HEADS), entries(n, 64)
    kv.provide((0, 1), n)
    kv.write(0, torch.arange(n), torch.arange(n), k, v)
    return kv, k, v


def stored(kv: RequestKV, head: int, entry: list[int]) -> tuple[Tensor, ...]:
    slots = torch.tensor([int(kv.table[0, head, e // BLOCK]) * BLOCK + e % BLOCK for e in entry])
    return kv.pool.layout.lift(slots)


def test_entries_that_move_keep_their_bytes() -> None:
    kv, k, v = table_of(150)
    keep = torch.arange(3, 150, 2)
    before = [stored(kv, head, keep.tolist()) for head in range(HEADS)]
    kv.keep(0, [keep] * HEADS)
    back = torch.tensor([4, 100])
    kv.provide((0, 1), 2)
    kv.write(0, back, back, k[back], v[back])  # sorted in between: those behind move once more
    at = torch.searchsorted(torch.cat([keep, back]).sort().values, keep).tolist()
    for head in range(HEADS):
        for a, b in zip(stored(kv, head, at), before[head]):
            assert torch.equal(a, b)


def test_bytes_depend_on_the_entry_alone() -> None:
    whole, k, v = table_of(150)
    parts = RequestKV(Pool(20, 64, torch.bfloat16, Int8Layout), 1, HEADS)
    parts.provide((0, 1), 150)
    for lo, hi in ((0, 1), (1, 97), (97, 150)):
        parts.write(0, torch.arange(lo, hi), torch.arange(lo, hi), k[lo:hi], v[lo:hi])
    for head in range(HEADS):
        for a, b in zip(*(stored(kv, head, list(range(150))) for kv in (whole, parts))):
            assert torch.equal(a, b)


def test_blocks_come_back_from_bytes() -> None:
    layout = written(100, 64)[0]
    other = Int8Layout(8, 64, torch.bfloat16)
    blocks = torch.tensor([1, 2, 4, 5])
    other.restore(blocks, layout.export(blocks))
    assert torch.equal(layout.k, other.k) and torch.equal(layout.v, other.v)


@pytest.mark.parametrize(
    ("precision", "parts"),
    [
        *[("bf16", set()), ("f32", set()), ("int8", {"linears", "kv"})],
        *[("int8:kv=bf16", {"linears"}), ("int8:linears=bf16", {"kv"})],
    ],
)
def test_parts_of_int8(precision: str, parts: set[str]) -> None:
    assert int8_parts(precision) == parts


@pytest.mark.parametrize(
    "precision", ["int8:", "int8:attention=off", "bf16:kv=bf16", "int8:kv=bf16,linears=bf16", "int4"]
)
def test_what_is_no_precision_is_refused(precision: str) -> None:
    with pytest.raises(UserError):
        int8_parts(precision)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs VNNI")
def test_an_engine_counts_int8_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path))
    sizes = {
        p: tiny_engine(precision=p).pool.block_nbytes for p in ("bf16", "int8:kv=bf16", "int8", "int8:linears=bf16")
    }
    assert sizes["bf16"] == sizes["int8:kv=bf16"] == 2 * 64 * 16 * 2 and sizes["int8"] == 2 * 64 * 20
    assert sizes["int8"] == sizes["int8:linears=bf16"]
