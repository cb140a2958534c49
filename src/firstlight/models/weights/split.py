"""A GGUF model in one file or in several: `name-00001-of-0000N.gguf` and so on, seen as one.

The first file holds the metadata, all of them tensors. Any of them may be named; the others must lie beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstlight.core.errors import UserError
from firstlight.models.weights.gguf import GGUFFile, TensorInfo

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def all_shards(name: str) -> list[str]:
    """The names of all files of a model, given one of them; the name itself where it isn't one of several."""
    match = _NAME.fullmatch(name)
    if match is None:
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


class GGUFModel:
    """`metadata`, `tensors` and `raw` as of one file; `paths` are the files. UserError if one is missing or foreign."""

    def __init__(self, path: Path) -> None:
        names = all_shards(path.name)
        if path.name not in names:
            raise UserError(f"{path}: its name counts {len(names)} files and is none of them; give it its name back")
        self.paths = [path.with_name(name) for name in names]
        files = [_opened(file, path, number) for number, file in enumerate(self.paths)]
        self.metadata: dict[str, Any] = files[0].metadata
        if (count := self.metadata.get("split.count", len(files))) not in (len(files), 0):
            raise UserError(
                f"{path}: the model was split into {count} files and the name says {len(files)}; give the files the "
                "names that they came with"
            )
        self._homes = {name: file for file in files for name in file.tensors}
        self.tensors: dict[str, TensorInfo] = {name: info for file in files for name, info in file.tensors.items()}
        total = sum(len(file.tensors) for file in files)
        if total != len(self.tensors) or self.metadata.get("split.tensors.count", total) != total:
            raise UserError(f"{path}: its files don't hold each tensor once; fetch all of them again")

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, uint8[nbytes], as a read-only view of its file's map."""
        return self._homes[name].raw(name)


def _opened(file: Path, asked: Path, number: int) -> GGUFFile:
    if file != asked and not file.exists():
        raise UserError(f"{asked}: a part of the model, and {file.name} is not beside it; fetch all parts")
    opened = GGUFFile(file)
    if opened.metadata.get("split.no", number) != number:
        raise UserError(f"{file}: holds another part of the model than its name says; fetch it again")
    return opened
