"""Hub ids, with a stand-in for the hub: what is asked of it, and one line for each way in which it can fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from firstlight.core.errors import UserError
from firstlight.models.weights import hub, huggingface


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[tuple[str, list[str]]]:
    """What the hub is asked for; it always answers with one folder."""
    calls: list[tuple[str, list[str]]] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_an_id_is_a_safetensors_model(asked, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve("org/some-model_1.0") == tmp_path
    assert asked == [("org/some-model_1.0", ["*.json", "*.jinja", "model*.safetensors", "README.md"])]


def test_an_id_with_a_file_is_that_file_and_the_parts_that_belong_to_it(asked, tmp_path):
    for name in ("m-Q4_K_M.gguf", "m-00001-of-00002.gguf"):
        (tmp_path / name).touch()
    assert hub.resolve("org/name/m-Q4_K_M.gguf") == tmp_path / "m-Q4_K_M.gguf"
    assert hub.resolve("org/name/m-00001-of-00002.gguf") == tmp_path / "m-00001-of-00002.gguf"
    parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert asked == [("org/name", ["m-Q4_K_M.gguf"]), ("org/name", parts)]
    with pytest.raises(UserError, match=r"org/name has no file x/other\.gguf"):
        hub.resolve("org/name/x/other.gguf")


def test_a_repository_of_gguf_files_wants_one_of_them(asked):
    with pytest.raises(UserError, match=r"holds no config\.json; for a GGUF file of it give org/name/FILE\.gguf"):
        hub.resolve("org/name")


@pytest.mark.parametrize("name", ["models/typo.gguf", "./a/b", "../a/b", "/a/b", "a/../b", "smollm3", "a b/c", "a/b/c"])
def test_what_is_no_id_never_reaches_the_hub(asked, name):
    with pytest.raises(UserError, match="neither a file or directory nor a known name"):
        hub.resolve(name)
    assert asked == []


def test_a_path_that_exists_is_a_path(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert hub.resolve("org/name") == Path("org/name")
    assert asked == []


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.LocalEntryNotFoundError("offline\nvery"),
            "is not on this machine and the hub cannot be reached",
        ),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), "the hub cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "no model 'org/name': neither on this machine nor"),
        (errors.HFValidationError("bad"), "no model 'org/name'"),
        (errors.GatedRepoError("403", response=RESPONSE), "wants its terms accepted on the hub first"),
        (ConnectionResetError("reset\nby peer"), r"could not be fetched from the hub \(reset by peer\); try again"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_every_failure_is_one_line(monkeypatch, error, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as caught:
        huggingface.fetch("org/name")
    assert "\n" not in str(caught.value)
