"""What parity tests leave behind: nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from firstlight.kernels.native import active_isa, lib


@pytest.fixture(autouse=True)
def same_instruction_set() -> Iterator[None]:
    before = active_isa()
    yield
    if lib is not None:
        lib.choose(before)
