"""Architecture name -> layer math. A new family is one file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder, Spread, Weight
from firstlight.models.gemma3 import Gemma3
from firstlight.models.llama import Llama, Mistral
from firstlight.models.qwen2 import Qwen2
from firstlight.models.qwen3 import Qwen3
from firstlight.models.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
    "gemma3": Gemma3,
}
_OTHER_NAMES = {"qwen3moe": "qwen3_moe", "gemma3_text": "gemma3"}
"""What GGUF files or text-only configs call them."""


def family_name(architecture: Any) -> str:
    """The key in FAMILIES of what a model file calls its architecture; UserError if there is none."""
    name = _OTHER_NAMES.get(architecture, architecture) if isinstance(architecture, str) else ""
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"architecture {architecture!r} is not supported; use a model of a supported one ({known})")
    return name


def build_model(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    backend: ModuleType,
    int8: Spread | None = None,
    centres: Sequence[Tensor] | None = None,
) -> Decoder:
    """The model of a config, its weights packed for a backend; `int8`: see `Decoder.prepared`; `centres`: `Decoder`."""
    family = FAMILIES[config.architecture]
    pieces = dict(family.prepared(config, weights, backend, int8))
    return family(config, pieces, backend, int8=int8 is not None, centres=centres)
