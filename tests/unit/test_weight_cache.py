"""The cache of packed weights: used when it is right, rebuilt when it is not, bounded, and done without."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firstlight.core.errors import UserError
from firstlight.models.weights import digest, store
from firstlight.models.weights.store import cache_bound, cache_size, kept

SHAPES = {"norm": ((3,), torch.float32), "0.qkv/panels": ((5, 3), torch.bfloat16), "0.qkv/scale": ((7,), torch.int8)}


class Tiny:
    """A model's pieces; counts how often they are made. Odd sizes: nothing is aligned by luck."""

    def __init__(self, name: str = "a") -> None:
        self.digest = (name * 64)[:64]
        self.made = 0

    def pieces(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (shape, dtype) in SHAPES.items():
            self.made += 1
            generator = torch.Generator().manual_seed(len(name) + ord(self.digest[0]))  # its own: threads call this
            yield name, (torch.randn(shape, generator=generator) * 9).to(dtype)


def load(model: Tiny, layout: str = "panels", progress: Callable[[float], None] | None = None) -> Any:
    return kept(model.digest, layout, model.pieces, expected=NBYTES, progress=progress)


NBYTES = 12 + 30 + 7


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FIRSTLIGHT_CACHE_BYTES", raising=False)
    return tmp_path / "cache" / "weights"


def check(loaded: Mapping[str, torch.Tensor], model: Tiny) -> None:
    want = dict(Tiny(model.digest[0]).pieces())
    assert list(loaded) == list(want)
    for name, tensor in loaded.items():
        assert tensor.dtype == want[name].dtype and torch.equal(tensor, want[name])
        assert tensor.data_ptr() % 64 == 0


def test_the_second_start_makes_nothing(cache):
    model, shares = Tiny(), []
    check(load(model, progress=shares.append), model)
    assert shares == pytest.approx([12 / NBYTES, 42 / NBYTES, 1])
    again = Tiny()
    loaded = load(again, progress=shares.append)
    assert (again.made, len(shares)) == (0, 3)
    check(loaded, again)
    [file] = cache.iterdir()
    assert file.stat().st_size == cache_size()


def test_an_untouched_file_is_not_read_before_it_is_needed(monkeypatch):
    load(Tiny())
    monkeypatch.setattr(store, "_checksum", lambda data: pytest.fail("all of it was read"))
    check(load(Tiny()), Tiny())


def test_a_copied_file_is_read_once(cache, monkeypatch):
    load(Tiny())
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes())
    again = Tiny()
    load(again)
    assert again.made == 0
    monkeypatch.setattr(store, "_checksum", lambda data: pytest.fail("read again"))
    load(again)


def test_changing_loaded_weights_does_not_change_the_cache(cache):
    loaded = load(Tiny())
    [file] = cache.iterdir()
    before = file.read_bytes()
    for tensor in loaded.values():
        tensor.zero_()
    assert file.read_bytes() == before


def test_models_and_layouts_do_not_meet(cache):
    for name in "ab":
        for layout in ("bf16-panels", "int8-rows"):
            check(load(Tiny(name), layout), Tiny(name))
    assert len(list(cache.iterdir())) == 4
    first, second = sorted(cache.iterdir())[:2]
    shutil.copy2(first, second)  # another layout's file in this one's place
    model = Tiny(first.name[0])
    load(model, second.name.partition("-")[2].removesuffix(".packed"))
    assert model.made == 3


def test_another_versions_file_is_made_anew(monkeypatch):
    load(Tiny())
    monkeypatch.setattr(store, "_LAYOUT", store._LAYOUT + 1)
    again = Tiny()
    check(load(again), again)
    assert again.made == 3


def damages(size: int) -> list[Callable[[bytes], bytes]]:
    flips = [
        lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(0, size, 3)
    ]
    cuts = [lambda data, at=at: data[:at] for at in (0, 1, 8, size // 2, size - 1)]
    half = [lambda data: data[:-40] + bytes(40), lambda data: data + b"\0", lambda data: bytes(len(data))]
    return flips + cuts + half


def test_any_damage_is_seen_and_repaired(cache):
    load(Tiny())
    [file] = cache.iterdir()
    good = file.read_bytes()
    for damage in damages(len(good)):
        file.unlink()
        file.write_bytes(damage(good))
        model = Tiny()
        loaded = load(model)
        assert model.made == 3
        check(loaded, model)
        load(again := Tiny())
        assert again.made == 0


def test_the_least_recently_used_goes_first(cache, monkeypatch):
    for name in "abc":
        load(Tiny(name))
        os.utime(cache / f"{name * 16}-panels.packed", (ord(name), ord(name)))
    one = cache_size() // 3
    load(Tiny("a"))  # used again: b is now the oldest
    monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", str(3 * one))
    load(Tiny("d"))
    assert sorted(path.name[0] for path in cache.iterdir()) == ["a", "c", "d"]
    assert cache_size() <= cache_bound()


def test_abandoned_partial_files_go_and_fresh_ones_stay(cache):
    cache.mkdir(parents=True)
    old, fresh = cache / ".x-1.partial", cache / ".x-2.partial"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    load(Tiny())
    assert (old.exists(), fresh.exists()) == (False, True)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def blocked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    if how == "bound":
        monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", "40")
    elif how == "free space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    elif how == "full disk":
        monkeypatch.setattr(store, "_write", no_space)
    else:
        (tmp_path / "file").write_text("not a directory")
        monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "file"))


@pytest.mark.parametrize("how", ["bound", "free space", "full disk", "no directory"])
def test_without_a_cache_it_goes_on_with_one_warning(cache, monkeypatch, tmp_path, caplog, how):
    blocked(monkeypatch, tmp_path, how)
    model = Tiny()
    check(load(model), model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not cached" in caplog.text
    assert not cache.exists() or not list(cache.iterdir())


def test_zero_bytes_switch_it_off_quietly(cache, monkeypatch, caplog):
    monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", "0")
    check(load(Tiny()), Tiny())
    assert not caplog.records
    monkeypatch.setenv("FIRSTLIGHT_CACHE_BYTES", "8GB")
    with pytest.raises(UserError, match="FIRSTLIGHT_CACHE_BYTES='8GB' is not a number of bytes"):
        cache_bound()


def test_an_interrupted_first_start_leaves_nothing(cache):
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(Tiny(), progress=interrupt)
    assert not list(cache.iterdir())


def test_writers_at_the_same_time_agree(cache):
    barrier = Barrier(4)

    def start(_: int) -> Any:
        barrier.wait()
        return load(Tiny())

    with ThreadPoolExecutor(4) as pool:
        for loaded in pool.map(start, range(4)):
            check(loaded, Tiny())
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
