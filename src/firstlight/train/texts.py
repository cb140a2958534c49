"""The text that methods are calibrated on: a chapter that no evaluation judges by (`evaluate/texts/README.md`)."""

from __future__ import annotations

import functools
from importlib import resources

NAME = "moby-dick-chapter-87"


@functools.cache
def calibration_text() -> str:
    """About 6,000 tokens of prose."""
    return resources.files("firstlight").joinpath("evaluate", "texts", f"{NAME}.txt").read_text("utf-8")
