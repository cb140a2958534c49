"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from firstlight.kernels.dispatch import cap_instruction_set
from firstlight.models.weights import hub

# Laws are tested bit for bit, so AMX stays off, whose blocking follows row and thread counts (decision 0003).
cap_instruction_set()

# `ci` finds the same examples every time; `long` is behind `make test-all`.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's file, if it is on this machine; tests never fetch it."""
    path = hub.pulled("smollm2")
    if path is None:
        pytest.skip("the real model is not here: run `firstlight models pull smollm2`, or set FIRSTLIGHT_MODELS")
    return path
