"""The cache of unpacked weights: used when it is right, rebuilt when it is not, bounded, and done without."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from firstlight.core.errors import UserError
from firstlight.models.weights import digest, store
from firstlight.models.weights.store import cache_bound, cache_size, load_weights

SHAPES = {"model.embed_tokens.weight": (5, 3), "model.norm.weight": (3,), "lm_head.weight": (7, 3)}


class Tiny:
    """A checkpoint that counts how often it is unpacked. Odd sizes: nothing is aligned by luck."""

    def __init__(self, name: str = "a") -> None:
        self.digest = (name * 64)[:64]
        self.shapes = SHAPES
        self.reads = 0

    def names(self) -> list[str]:
        return list(SHAPES)

    def tensor(self, name: str) -> torch.Tensor:
        self.reads += 1
        generator = torch.Generator().manual_seed(len(name) + ord(self.digest[0]))  # its own: threads call this
        return torch.randn(SHAPES[name], generator=generator)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FIRSTLIGHT_CACHE_BYTES", raising=False)
    return tmp_path / "cache" / "weights"


def check(loaded: dict[str, torch.Tensor], model: Tiny, dtype: torch.dtype) -> None:
    assert list(loaded) == list(SHAPES)
    for name, tensor in loaded.items():
        assert tensor.dtype == (torch.float32 if tensor.dim() == 1 else dtype)
        assert torch.equal(tensor, model.tensor(name).to(tensor.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_second_start_unpacks_nothing(cache, dtype):
    model, shares = Tiny(), []
    check(load_weights(model, dtype, progress=shares.append), model, dtype)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    again = Tiny()
    loaded = load_weights(again, dtype, progress=shares.append)
    assert (again.reads, len(shares)) == (0, 3)
    check(loaded, again, dtype)
    [file] = cache.iterdir()
    assert file.stat().st_size == cache_size()
    check({name: load_file(file)[name] for name in SHAPES}, again, dtype)  # it is a plain safetensors file


def test_changing_loaded_weights_does_not_change_the_cache(cache):
    loaded = load_weights(Tiny(), torch.float32)
    [file] = cache.iterdir()
    before = file.read_bytes()
    for tensor in loaded.values():
        tensor.zero_()
    assert file.read_bytes() == before


def test_models_and_dtypes_do_not_meet(cache):
    for name in "ab":
        for dtype in (torch.float32, torch.bfloat16):
            check(load_weights(Tiny(name), dtype), Tiny(name), dtype)
    assert len(list(cache.iterdir())) == 4


def damages(size: int) -> list[Callable[[bytes], bytes]]:
    flips = [
        lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(0, size, 3)
    ]
    cuts = [lambda data, at=at: data[:at] for at in (0, 1, 8, size // 2, size - 1)]
    half = [lambda data: data[:-40] + bytes(40), lambda data: data + b"\0", lambda data: bytes(len(data))]
    return flips + cuts + half


def test_any_damage_is_seen_and_repaired(cache):
    load_weights(Tiny(), torch.bfloat16)
    [file] = cache.iterdir()
    good = file.read_bytes()
    for damage in damages(len(good)):
        file.unlink()
        file.write_bytes(damage(good))
        model = Tiny()
        loaded = load_weights(model, torch.bfloat16)
        assert model.reads == 3
        check(loaded, model, torch.bfloat16)
        assert file.read_bytes() == good


def test_the_least_recently_used_goes_first(cache, monkeypatch):
    for name in "abc":
        load_weights(Tiny(name), torch.float32)
        os.utime(cache / f"{name * 16}-f32.safetensors", (ord(name), ord(name)))
    one = cache_size() // 3
    load_weights(Tiny("a"), torch.float32)  # used again: b is now the oldest
    monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", str(3 * one))
    load_weights(Tiny("d"), torch.float32)
    assert sorted(path.name[0] for path in cache.iterdir()) == ["a", "c", "d"]
    assert cache_size() <= cache_bound()


def test_abandoned_partial_files_go_and_fresh_ones_stay(cache):
    cache.mkdir(parents=True)
    old, fresh = cache / ".x-1.partial", cache / ".x-2.partial"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    load_weights(Tiny(), torch.float32)
    assert (old.exists(), fresh.exists()) == (False, True)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def blocked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    if how == "bound":
        monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", "100")
    elif how == "free space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    elif how == "full disk":
        monkeypatch.setattr(store._Plan, "write", no_space)
    else:
        (tmp_path / "file").write_text("not a directory")
        monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "file"))


@pytest.mark.parametrize("how", ["bound", "free space", "full disk", "no directory"])
def test_without_a_cache_it_goes_on_with_one_warning(cache, monkeypatch, tmp_path, caplog, how):
    blocked(monkeypatch, tmp_path, how)
    model = Tiny()
    check(load_weights(model, torch.bfloat16), model, torch.bfloat16)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not cached" in caplog.text
    assert not cache.exists() or not list(cache.iterdir())


def test_zero_bytes_switch_it_off_quietly(cache, monkeypatch, caplog):
    monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", "0")
    check(load_weights(Tiny(), torch.bfloat16), Tiny(), torch.bfloat16)
    assert not caplog.records
    monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", "8GB")
    with pytest.raises(UserError, match="FIRSTLIGHT_CACHE_BYTES='8GB' is not a number of bytes"):
        cache_bound()


def test_an_interrupted_first_start_leaves_nothing(cache):
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_weights(Tiny(), torch.bfloat16, progress=interrupt)
    assert not list(cache.iterdir())


def test_writers_at_the_same_time_agree(cache):
    barrier = Barrier(4)

    def start(_: int) -> dict[str, torch.Tensor]:
        barrier.wait()
        return load_weights(Tiny(), torch.bfloat16)

    with ThreadPoolExecutor(4) as pool:
        for loaded in pool.map(start, range(4)):
            assert all(torch.equal(tensor, Tiny().tensor(name).to(tensor.dtype)) for name, tensor in loaded.items())
    assert len(list(cache.iterdir())) == 1


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file, hashed = tmp_path / "m.gguf", []
    real = digest.hash_file
    monkeypatch.setattr(digest, "hash_file", lambda path: hashed.append(path) or real(path))
    file.write_bytes(b"one")
    first = digest.file_digest(file)
    assert digest.file_digest(file) == first == real(file)
    assert len(hashed) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert digest.file_digest(file) == real(file) != first
    [note] = (tmp_path / "cache" / "digests").iterdir()
    for damage in ("", "[]", "{}", note.read_text().replace(real(file), "0")):
        note.write_text(damage)
        assert digest.file_digest(file) == real(file)
