"""A virtual environment for each peer, made when it is first needed: pip's ordinary downloads, nothing of ours inside.

It lives in the cache directory under a name that follows from its recipe, so a changed recipe makes a new one and
removes the old. The constraint on torch keeps a dependency from replacing it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from firstlight.core.config import format_bytes
from firstlight.core.errors import UserError
from firstlight.core.files import cache_dir
from firstlight.evaluate.peers.recipes import TORCH, Recipe

Tell = Callable[[str], None]
INSTALL_LIMIT_S = 3600.0
_NOT_THEIRS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "GOMP_SPINCOUNT", "ONEDNN_MAX_CPU_ISA")


def home() -> Path:
    """Where environments, converted files and sweeps are kept."""
    return cache_dir() / "peers"


def python_of(recipe: Recipe, tell: Tell) -> Path:
    """The interpreter of a peer's environment, installed if need be; UserError with pip's reason where it can't be."""
    if recipe.is_ours:
        return Path(sys.executable)
    folder = home() / f"{recipe.name}-{_fingerprint(recipe)}"
    ready = folder / "ready"
    if not ready.exists():
        for old in home().glob(f"{recipe.name}-*"):
            shutil.rmtree(old, ignore_errors=True)
        tell(f"{recipe.name}: installing")
        _install(recipe, folder)
        ready.write_text("")
        tell(f"{recipe.name}: installed, {format_bytes(size_of(folder))} in {folder}")
    return _python(folder)


def environment(recipe: Recipe) -> Mapping[str, str]:
    """The variables of a peer's process: ours, without those that would lead or slow another engine."""
    kept = () if recipe.is_ours else _NOT_THEIRS
    return {key: value for key, value in os.environ.items() if key not in kept}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _fingerprint(recipe: Recipe) -> str:
    said = repr((recipe.install, recipe.whole_of, recipe.without, TORCH, sys.version_info[:2]))
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _install(recipe: Recipe, folder: Path) -> None:
    """All of the recipe's steps, or nothing: what a failed one leaves is removed."""
    try:
        venv.create(folder, with_pip=False, symlinks=True)
        (folder / "constraints").write_text(f"{TORCH}\n")
        for arguments in recipe.install:
            _pip(recipe, folder, arguments)
        if recipe.whole_of:
            _pip(recipe, folder, list(_needs(recipe, folder)))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{recipe.name} can't be installed ({error.strerror or error}); free or change it") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _pip(recipe: Recipe, folder: Path, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(_python(folder)), "install", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--constraint", str(folder / "constraints"), *arguments]
    done = subprocess.run(
        command,
        env=environment(recipe),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT_S,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["pip said nothing"]
        raise UserError(f"{recipe.name} can't be installed: {errors[-1].removeprefix('ERROR:').strip()[:200]}")


def _needs(recipe: Recipe, folder: Path) -> Iterator[str]:
    """What the installed package says it needs, less what the recipe leaves out and optional extras."""
    site = next(folder.glob("lib/python*/site-packages"))
    found = next(iter(importlib.metadata.distributions(name=recipe.whole_of or "", path=[str(site)])))
    for requirement in found.requires or ():
        name, marker = re.split(r"[^\w.-]", requirement, maxsplit=1)[0], requirement.partition(";")[2]
        if name.lower() not in recipe.without and "extra" not in marker:
            yield requirement
