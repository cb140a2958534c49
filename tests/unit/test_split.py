"""A model in several GGUF files is the same model; a part that is missing or foreign is named."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from firstlight.core.errors import UserError
from firstlight.models.weights.split import GGUFModel, all_shards

TENSORS = {f"blk.{i}.w": np.arange(8, dtype=np.float32) + i for i in range(7)}


def write(path: Path, tensors: dict[str, np.ndarray], *, at_most: int = 0) -> list[Path]:
    """The files that the gguf package makes of these tensors, at most so many in each."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=at_most)
    writer.add_string("general.name", "split")
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("*.gguf"))


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    return write(tmp_path / "m.gguf", TENSORS, at_most=3)


def test_any_part_opens_the_whole_model(parts):
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in parts:
        model = GGUFModel(path)
        assert (model.paths, model.metadata["general.name"]) == (parts, "split")
        assert model.tensors.keys() == TENSORS.keys()
        for name, value in TENSORS.items():
            assert np.array_equal(model.raw(name).view(np.float32), value)


def test_one_file_is_a_model_of_one_part(tmp_path):
    (path,) = write(tmp_path / "m.gguf", TENSORS)
    assert GGUFModel(path).paths == [path]
    assert GGUFModel(path.rename(tmp_path / "n-00001-of-00001.gguf")).tensors.keys() == TENSORS.keys()


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf is not beside it; fetch all parts"):
        GGUFModel(parts[0])
    with pytest.raises(UserError, match="no such file"):
        GGUFModel(parts[1])


def test_parts_that_are_not_what_their_names_say(parts, tmp_path):
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf: holds another part of the model"):
        GGUFModel(parts[0])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(UserError, match="was split into 3 files and the name says 1"):
        GGUFModel(alone)
    (foreign,) = write(tmp_path / "x" / "m.gguf", TENSORS)
    with pytest.raises(UserError, match="its name counts 3 files and is none of them"):
        GGUFModel(foreign.rename(tmp_path / "m-00004-of-00003.gguf"))


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    (path,) = write(tmp_path / "m.gguf", TENSORS)
    for i in (1, 2):
        (tmp_path / f"m-0000{i}-of-00002.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="don't hold each tensor once"):
        GGUFModel(tmp_path / "m-00001-of-00002.gguf")


def test_a_part_of_another_export_is_refused(parts, tmp_path):
    other = write(tmp_path / "other" / "m.gguf", dict(list(TENSORS.items())[:2]), at_most=1)
    parts[1].write_bytes(other[1].read_bytes())  # holds blk.1.w, which the first part holds too
    with pytest.raises(UserError, match="don't hold each tensor once"):
        GGUFModel(parts[0])
    (fewer,) = write(tmp_path / "fewer" / "m.gguf", {"blk.9.w": TENSORS["blk.0.w"]})
    parts[2].write_bytes(fewer.read_bytes())
    parts[1].write_bytes(fewer.read_bytes())
    with pytest.raises(UserError, match="don't hold each tensor once"):
        GGUFModel(parts[0])


@pytest.mark.parametrize(
    ("name", "count"), [("m.gguf", 1), ("m-00001-of-00004.gguf", 4), ("m-1-of-4.gguf", 1), ("m-00001-of-00004.bin", 1)]
)
def test_names_of_parts(name, count):
    assert len(all_shards(name)) == count
    assert name in all_shards(name)
