"""`firstlight calibrate`: runs a method's procedure on a model, and keeps what it finds where the method looks for it.

A procedure is a module of this folder named as its method, with `Config` (a frozen dataclass whose fields carry a text
`doc`) and `calibrate(llm, config, notebook) -> Found`. It writes what it has done so far into the notebook, so that a
run that was stopped goes on there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from firstlight.core.calibration import Calibration, default_path, write
from firstlight.core.errors import UserError
from firstlight.core.files import write_atomically
from firstlight.core.registry import Method, classes, configure, is_calibrated, names
from firstlight.llm import LLM

Tell = Callable[[str, float, float], None]
"""(what is done, how much of it, of how much)."""


@dataclass(frozen=True)
class Found:
    """What a procedure found: JSON values for the method, and the texts that it saw (name -> the text)."""

    values: Mapping[str, Any]
    texts: Mapping[str, str]


class Notebook:
    """What a procedure has done so far, on the disk, and its way to tell how far it is."""

    def __init__(self, path: Path, run: Mapping[str, Any], tell: Tell = lambda what, done, total: None) -> None:
        self._path, self._run, self.tell = path, json.dumps(run, sort_keys=True), tell

    def read(self) -> dict[str, Tensor]:
        """What was written last by an equal run; empty if none was stopped."""
        with contextlib.suppress(OSError, SafetensorError), safe_open(self._path, "pt") as stored:
            if (stored.metadata() or {}).get("run") == self._run:
                return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is no dictionary
        return {}

    def write(self, done: Mapping[str, Tensor]) -> None:
        """In place of what was there."""
        with write_atomically(self._path) as partial:
            save_file({key: tensor.contiguous() for key, tensor in done.items()}, partial, {"run": self._run})

    def close(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)


def calibratable() -> list[str]:
    """The methods that read a calibration."""
    return [name for name in names() if is_calibrated(classes(name))]


def procedure_of(method: Method) -> tuple[Any, Any]:
    """A method's procedure (its module) and its config. Raises UserError that lists the choices."""
    if method.name not in names() or not is_calibrated(classes(method.name)):
        raise UserError(
            f"{method.name!r} is no method that is calibrated; choose one of: {', '.join(calibratable()) or 'none'}"
        )
    name = f"firstlight.train.{method.name}"
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{method.name} comes from another package; that one makes its calibrations")
    module = importlib.import_module(name)
    return module, configure(module, method, {field.name for field in dataclasses.fields(module.Config)})


def calibrate(llm: LLM, method: Method, out: Path | None = None, tell: Tell = lambda *_: None) -> Calibration:
    """Run the procedure, or the rest of it, and write the file; None: where the method looks for it by itself."""
    module, config = procedure_of(method)
    digest, settings = llm.engine.limits.model_digest, dataclasses.asdict(config)
    usual = default_path(method.name, digest)
    notebook = Notebook(usual.with_name(f"{method.name}.unfinished"), {"settings": settings}, tell)
    found: Found = module.calibrate(llm, config, notebook)
    texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in found.texts.items()}
    made = Calibration(method.name, digest, settings, texts, found.values, str(out or usual))
    write(out or usual, made)
    notebook.close()
    return made
