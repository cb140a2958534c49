"""Architecture name -> layer math. A new family is one file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from firstlight.models.config import ModelConfig
from firstlight.models.llama import Llama

FAMILIES = {"llama": Llama}


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], backend: ModuleType) -> Llama:
    """The model of a config, its weights packed for a backend."""
    return FAMILIES[config.architecture](config, weights, backend)
