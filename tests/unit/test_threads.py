"""Threads have cores of their own while a pass runs, and nothing is bound afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from firstlight.kernels import threads
from firstlight.kernels.native import lib
from firstlight.kernels.threads import bound, cores

pytestmark = pytest.mark.skipif(lib is None or len(cores()) < 2, reason="needs compiled kernels and two cores")


@pytest.fixture(autouse=True)
def _a_thread_for_each_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(cores()))
    yield
    torch.set_num_threads(before)


def places() -> list[set[int]]:
    """Where each of this process's threads may run."""
    return [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]


def test_each_core_has_one_thread_and_the_caller_is_free_afterwards() -> None:
    before = os.sched_getaffinity(0)
    with bound():
        assert os.sched_getaffinity(0) == set(cores()[0])
        assert all(set(core) in places() for core in cores())
    assert os.sched_getaffinity(0) == before


def test_an_error_unbinds_too() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), bound():
        _ = 1 / 0
    assert os.sched_getaffinity(0) == before


def test_a_step_inside_a_step_leaves_the_way_back() -> None:
    """As when a callback of one engine asks another."""
    before = os.sched_getaffinity(0)
    with bound():
        with bound():
            assert os.sched_getaffinity(0) == set(cores()[0])
        assert os.sched_getaffinity(0) == set(cores()[0])
    assert os.sched_getaffinity(0) == before


def test_each_thread_that_steps_has_its_own_place_to_go_back_to() -> None:
    mine, seen = {max(os.sched_getaffinity(0))}, []

    def step() -> None:
        os.sched_setaffinity(0, mine)  # this thread alone: not all cores are open to it, so nothing is bound
        with bound():
            seen.append(os.sched_getaffinity(0))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert seen == [mine, mine]


def test_fewer_threads_than_cores_are_left_alone() -> None:
    before = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    with bound():
        assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"])
def test_whoever_has_bound_threads_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert threads.cores.__wrapped__() == []
