"""Firstlight: an LLM engine built around prefill, the part of inference that people wait for."""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
    from firstlight.core.registry import Method as Method
    from firstlight.core.request import SamplingParams as SamplingParams
    from firstlight.llm import LLM as LLM
    from firstlight.llm_async import AsyncLLM as AsyncLLM

__version__ = "0.1.0"

# torch's OpenMP threads spin at barriers. Beside another busy process they spin for whole time slices (decision 0006),
# so the spinning is bounded here: it has to be said before torch is loaded, and whoever set it already is obeyed.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {
    "LLM": "firstlight.llm",
    "AsyncLLM": "firstlight.llm_async",
    "SamplingParams": "firstlight.core.request",
    "Method": "firstlight.core.registry",
}


def __getattr__(name: str) -> typing.Any:
    """The public names, imported when they are first used: the command line's help must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
