"""A tape does to memory what was done while it was recorded, or says that it can't."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from answers import backend
from cases import Spec, build
from torch import Tensor

from firstlight.kernels.memory import Memory
from firstlight.kernels.native import lib
from firstlight.kernels.tape import Bell, Tape, holding, recording

if lib is None:
    pytest.skip("no compiled kernels here", allow_module_level=True)

from firstlight.kernels.cpu import ops

GAIN = torch.linspace(0.5, 2, 64)


def recorded(work: Callable[[], object], memory: Memory | None = None) -> Tape:
    with torch.inference_mode(), recording(memory or Memory()) as tape:
        work()
    return tape


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Kernels, memory in between, views, and operators that only write."""
    h = ops.rms_norm(x, GAIN, 1e-5)
    assert isinstance(h, Tensor)
    h.add_(bias, alpha=2)
    gated = ops.silu_mul(h.view(len(x), 64))
    assert isinstance(gated, Tensor)
    out[1:].copy_(gated[1:])


@torch.inference_mode()
def test_it_does_the_same_to_new_values() -> None:
    x, bias, out = rows(0, 5, 64), rows(1, 64), torch.zeros(5, 32)
    tape = recorded(lambda: step(x, bias, out))
    assert tape.is_whole
    for seed in range(2, 5):
        x.copy_(rows(seed, 5, 64))
        bias.copy_(rows(seed + 10, 64))
        want = torch.zeros(5, 32)
        step(x, bias, want)
        tape.run()
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda x: x * 2,
        lambda x: x[0, 0].item(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.zeros(3),
        lambda x: torch.empty(3, dtype=torch.int64).add(1),
        lambda x: x.clone(),
        lambda x: x.sort(),
        lambda x: torch.nn.functional.pad(x, (0, 1)),
        lambda x: x[torch.tensor([1, 0])],
    ],
)
def test_what_it_cannot_repeat_it_refuses(foreign: Callable[[Tensor], object]) -> None:
    x = rows(0, 4, 64)
    assert not recorded(lambda: (ops.rms_norm(x, GAIN, 1e-5), foreign(x))).is_whole
    assert recorded(lambda: ops.rms_norm(x, GAIN, 1e-5)).is_whole


def test_a_call_whose_plan_is_its_own_is_not_repeated() -> None:
    """The plan's lists are gone when the next call comes."""
    for plan, is_whole in (("none", True), ("mixed", False)):
        call = build(Spec(plan=plan, dim=16))
        assert recorded(lambda call=call: backend("cpu").attend(call, 0, len(call.q))).is_whole == is_whole


def test_a_tape_with_half_a_one_behind_it_is_not_whole() -> None:
    x = rows(0, 4, 64)
    whole, half = (recorded(lambda f=f: (ops.rms_norm(x, GAIN, 1e-5), f(x))) for f in (lambda x: x, lambda x: x * 2))
    whole.extend(whole)
    assert whole.is_whole
    whole.extend(half)
    assert not whole.is_whole


def test_memory_is_lent_once_a_recording() -> None:
    memory, x = Memory(), rows(0, 4, 64)

    def asked(count: int) -> list[int]:
        made: list[Tensor] = []
        recorded(lambda: made.extend(torch.empty(4, 64) for _ in range(count)), memory)
        return [t.data_ptr() for t in made]

    first, more = asked(2), asked(5)
    assert more[:2] == first and len(set(more)) == 5 and asked(5) == more
    assert x.data_ptr() not in more


@torch.inference_mode()
def test_other_threads_are_not_heard() -> None:
    x, other = rows(0, 4, 64), rows(1, 4, 64)

    def beside() -> None:
        thread = threading.Thread(target=lambda: ops.add_rows(other, x))
        thread.start()
        thread.join()

    tape = recorded(beside)
    before = other.clone()
    tape.run()
    assert tape.is_whole and torch.equal(other, before)


def test_kernels_are_themselves_again_afterwards() -> None:
    assert lib is not None
    kernels = dict(vars(lib))
    with pytest.raises(KeyboardInterrupt), recording(Memory()):
        raise KeyboardInterrupt
    assert dict(vars(lib)) == kernels


def test_a_recording_leaves_pytorchs_compiler_alone() -> None:
    """Importing it takes seconds and a hundred megabytes: a second token would wait for them."""
    code = "import sys, torch; from firstlight.kernels.memory import Memory\n"
    code += "from firstlight.kernels.tape import recording\n"
    code += "with recording(Memory()): torch.empty(4)\nprint('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@torch.inference_mode()
def test_a_repeated_call_finds_its_operands_elsewhere() -> None:
    """Addresses that are named move, others and plain numbers stay."""
    x, memory, other = rows(0, 5, 64), Memory(), torch.linspace(1, 3, 64)
    want = ops.silu_mul(ops.rms_norm(x, other, 1e-5).clone())
    with holding(memory) as first:
        ops.rms_norm(x, other, 1e-5)
        made = ops.silu_mul(ops.rms_norm(x, GAIN, 1e-5))
    with holding(memory) as tape:
        tape.repeat(first, 1, 3, [GAIN.data_ptr()], [[other.data_ptr()]])
    assert isinstance(made, Tensor) and isinstance(want, Tensor) and len(tape) == 2
    tape.run()
    assert torch.equal(made, want)


@torch.inference_mode()
def test_held_calls_are_made_when_the_tape_is_run_and_not_before() -> None:
    x, memory = rows(0, 5, 64), Memory()
    want = ops.silu_mul(ops.rms_norm(x, GAIN, 1e-5).clone())
    with holding(memory) as tape:
        made = ops.silu_mul(ops.rms_norm(x, GAIN, 1e-5))
    assert isinstance(made, Tensor) and isinstance(want, Tensor)
    made.fill_(7)
    assert len(tape) == 2 and bool((made == 7).all())
    assert len(tape.timed(0, [1], Bell())) == 1 and bool((made == 7).all())
    tape.run(1)
    assert torch.equal(made, want)


@torch.inference_mode()
def test_ctrl_c_ends_a_tape_that_nobody_rings() -> None:
    """No line of Python runs between its calls, whose end would take half a minute."""
    x, memory, ended, bell = rows(0, 64, 64), Memory(), list[int](), Bell()
    with holding(memory) as tape:
        ops.rms_norm(x, GAIN, 1e-5)
    for _ in range(22):
        once, tape = tape, Tape()
        tape.extend(once)
        tape.extend(once)
    tape.note(ended.append, (1,))
    bell.after(math.inf)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        tape.timed(0, [*range(1000, len(tape), 1000), len(tape)], bell)
    assert not ended


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_rows_are_what_pytorch_makes_of_them(dtype: torch.dtype) -> None:
    wide, by = rows(0, 5, 3, 80).to(dtype), rows(1, 2, 80).to(dtype)
    want = wide.clone()
    want[:, 1:] += by
    ops.shift_rows(wide[:, 1:], by.float())
    assert torch.equal(wide, want)
