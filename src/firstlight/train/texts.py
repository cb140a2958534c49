"""The text that methods are calibrated on: a chapter that no evaluation judges by (`evaluate/texts/README.md`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from firstlight.core.errors import UserError
from firstlight.core.files import shipped

NAME = "moby-dick-chapter-87"


@functools.cache
def calibration_text() -> str:
    """About 6,000 tokens of prose."""
    return shipped(f"evaluate/texts/{NAME}.txt")


def pieces(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Prompts from a text's ids, one after the other; the last ones overlap if it is too short for all of them.

    Raises UserError if it is too short for one.
    """
    if len(ids) < length:
        raise UserError(f"the text has {len(ids)} tokens; give a length of no more")
    step = min(length, (len(ids) - length) // max(count - 1, 1))
    return [list(ids[step * n : step * n + length]) for n in range(count)]
