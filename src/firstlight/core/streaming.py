"""Streaming heads: KV heads that read the first and the last tokens only (DuoAttention, arXiv 2410.10819).

What the parts of such a method in attention/ (what these heads read) and in cache/ (what may go of them) must agree on:
the settings, and which heads they are. Pure numbers, decided once before the first request.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts

Gates = Sequence[Sequence[float]]
"""[layers][Hkv]: how much each KV head needs far context."""
MODES = ("strict", "reference")
TABLE = "full_attention_heads.tsv"
"""The published file of gates: a line a layer, a column a KV head."""


@dataclass(frozen=True)
class StreamingConfig:
    """Raises UserError on values that no head can have."""

    streaming_ratio: float = field(default=0.5, metadata={"doc": "share of the KV heads that stream"})
    sink: int = field(default=64, metadata={"doc": "tokens at the start of the prompt that a streaming head reads"})
    recent: int = field(default=256, metadata={"doc": "last tokens that it reads, its own included"})
    mode: str = field(
        default="strict",
        metadata={
            "doc": "strict: exactly that, however the prompt is cut; reference, as published: the current chunk too, "
            "and the last tokens before it"
        },
    )
    seed: int = field(default=0, metadata={"doc": "which of equal gates stream"})

    def __post_init__(self) -> None:
        if not 0 <= self.streaming_ratio <= 1:
            raise UserError(f"duoattention: streaming_ratio={self.streaming_ratio} is no share; give 0 to 1")
        for key, least in (("sink", 0), ("recent", 1)):
            if getattr(self, key) < least:
                raise UserError(f"duoattention: {key}={getattr(self, key)} is too small; give {least} or more")
        if self.mode not in MODES:
            raise UserError(f"duoattention: mode={self.mode!r} is unknown; choose {' or '.join(MODES)}")


def streaming_heads(config: StreamingConfig, model: ModelFacts, calibration: Calibration | None) -> list[list[bool]]:
    """[layers][Hkv]: which KV heads stream. Raises UserError if the gates aren't there, or aren't this model's."""
    check_model(model)
    if calibration is None:
        raise UserError(
            "duoattention needs this model's gates, and there are none; make them with "
            "`firstlight calibrate MODEL duoattention`"
        )
    gates: Gates = calibration.value("gates", list)
    _check_gates(gates, model, calibration.path)
    return lowest(gates, config.streaming_ratio, config.seed)


def check_model(model: ModelFacts) -> None:
    """Raises UserError for models whose gates would mean nothing."""
    full = model.full_layers
    if len(full) < model.num_layers:
        raise UserError(
            f"duoattention can't be used with this model: its window layers stream by themselves, and among the "
            f"{len(full)} others of {model.num_kv_heads} KV head(s) gates mean nothing; leave duoattention out"
        )


def lowest(gates: Gates, ratio: float, seed: int) -> list[list[bool]]:
    """The heads of the lowest gates, a `ratio` of all; dice of `seed` decide among equal ones."""
    dice = random.Random(seed)
    ranked = sorted((gate, dice.random(), i, h) for i, row in enumerate(gates) for h, gate in enumerate(row))
    chosen = {(i, h) for _, _, i, h in ranked[: round(ratio * len(ranked))]}
    return [[(i, h) in chosen for h in range(len(row))] for i, row in enumerate(gates)]


def read_table(path: Path) -> Mapping[str, Any] | None:
    """Calibration values from the published file or its folder; None for other files. UserError if it is damaged."""
    path = path / TABLE if path.is_dir() else path
    if path.suffix != ".tsv":
        return None
    try:
        gates = [
            [float(cell) for cell in line.split()] for line in path.read_text("utf-8").splitlines() if line.strip()
        ]
    except OSError as error:
        raise UserError(f"can't read the gates {path}: {error.strerror}; name another file") from None
    except ValueError as error:
        raise UserError(f"{path} is no table of gates ({error}); name another file") from None
    return {"gates": gates}


def _check_gates(gates: Gates, model: ModelFacts, path: str) -> None:
    """A table comes from a file that anybody may have written."""
    rows = all(isinstance(row, list) for row in gates)
    if not rows or [len(row) for row in gates] != [model.num_kv_heads] * model.num_layers:
        found = f"{len(gates)} x {len(gates[0])}" if rows and gates else "other"
        raise UserError(
            f"the gates {path} are {found}, the model has {model.num_layers} layers x {model.num_kv_heads} KV heads; "
            "name the file of this model"
        )
    if not all(isinstance(gate, int | float) and math.isfinite(gate) for row in gates for gate in row):
        raise UserError(f"the gates {path} hold something that is no number; write them again")
