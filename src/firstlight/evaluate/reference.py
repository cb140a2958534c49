"""The float32 reference of each excerpt: made once for a model and a text, then kept in the cache folder.

One safetensors file per (model digest, excerpt). The folder is bounded and forgets the least recently used first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from firstlight.core.files import cache_dir, write_atomically
from firstlight.engine.engine import Engine
from firstlight.evaluate import reading
from firstlight.evaluate.distance import LIKELIEST, Outline
from firstlight.evaluate.reading import Excerpt, Reference, refer

log = logging.getLogger(__name__)

_LAYOUT = 1  # raise it when a file's meaning changes
_BOUND = 2 << 30
"""Bytes that the folder may hold; an excerpt takes about 19 MB."""


class References:
    """References of one model. Those that could not be kept on disk are kept here."""

    def __init__(self, model_digest: str) -> None:
        self._digest = model_digest
        self._kept: dict[Path, Reference] = {}

    def find(self, what: Excerpt) -> Reference | None:
        """The reference of an excerpt, if it was made before."""
        path = self._path(what)
        if path in self._kept:
            return self._kept[path]
        try:
            found = load_file(path)
            path.touch()  # marks it as recently used
            outline = Outline(found["ids"], found["logp"], found["rest"])
            return Reference(outline, found["nll"], found["nll_truncated"])
        except (OSError, SafetensorError, KeyError):
            return None

    def make(self, engine: Engine, what: Excerpt) -> None:
        """Make it with an engine that is dense and float32."""
        made, path = refer(engine, what), self._path(what)
        outline = made.outline
        tensors = {"ids": outline.ids, "logp": outline.logp, "rest": outline.rest}
        try:
            with write_atomically(path) as partial:
                save_file(tensors | {"nll": made.nll, "nll_truncated": made.nll_truncated}, partial)
            _forget(path.parent, _BOUND, spare=path)
        except OSError as error:
            log.warning("the float32 reference is not cached on disk, so the next run makes it again: %s", error)
            self._kept[path] = made

    def _path(self, what: Excerpt) -> Path:
        facts = json.dumps(
            [_LAYOUT, LIKELIEST, reading.TRUNCATED, what.length, what.num_bos, what.rows.tolist(), what.ids]
        )
        return cache_dir() / "reference" / f"{self._digest[:16]}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.st"


def _forget(folder: Path, bound: int, spare: Path) -> None:
    """Remove the least recently used files but one until the folder holds no more than `bound` bytes."""
    entries = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.st"))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total > bound and path != spare:
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
