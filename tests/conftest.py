"""What all tests share."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import settings

from firstlight.core.settings import OTHER_VARIABLES, PREFIX
from firstlight.kernels.dispatch import cap_instruction_set
from firstlight.models.weights import hub

# Laws are tested bit for bit, so AMX stays off, whose blocking follows row and thread counts (decision 0003).
cap_instruction_set()

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nobody's own settings reach the tests.
for _name in [name for name in os.environ if name.startswith(PREFIX) and name not in OTHER_VARIABLES]:
    del os.environ[_name]
os.environ["FIRSTLIGHT_CONFIG"] = os.devnull

# `ci` finds the same examples every time; `long` is behind `make test-all`.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws doesn't hang on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's file, if it is on this machine; tests never fetch it."""
    path = hub.pulled("smollm2")
    if path is None:
        pytest.skip("the real model is not here: run `firstlight models pull smollm2`, or set FIRSTLIGHT_MODELS")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files whose tensors are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def sockets_stay_closed() -> Iterator[None]:
    """No test talks to anybody."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a test opened a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield
