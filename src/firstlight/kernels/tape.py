"""Calls of kernels that are noted: to be made later (`holding`), or again and again (`recording`).

Held calls are all that some stretch of a pass has to do. Python decides the whole stretch while its own code is in the
caches, which every kernel sweeps out of them, and then has the calls made, piece by piece, without it.

A recording hears the compiled kernels' calls and PyTorch's operators while they run. Kernels work on addresses, so the
same calls do the same to whatever lies there the next time. Of PyTorch's operators views do nothing, those that only
write one of their inputs can be repeated as they are, and memory that they ask for is handed out from `Memory`, which
stays. Anything else (a new tensor with something in it, a number taken out of a tensor) can't be repeated blindly: then
there is no tape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from firstlight.kernels.memory import Memory
from firstlight.kernels.native import lib

_EMPTY = torch.ops.aten.empty.memory_format
if TYPE_CHECKING or lib is None:

    class Tape:
        """Calls in their order, with operands that stay where they are (csrc/tape.h)."""

        is_whole = True
        """Whether running it does all that was done in the recording."""
        holds = False
        """Whether calls are noted only, to be made when it is run."""

        def __len__(self) -> int:
            """Calls so far."""
            return 0

        def note(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
            """One more, of Python's own."""

        def extend(self, other: Tape) -> None:
            """What another tape does, afterwards."""

        def repeat(self, tape: Tape, begin: int, end: int, old: Sequence[int], sets: Sequence[Sequence[int]]) -> None:
            """Calls [begin, end) of a tape, afterwards, once for each set of new addresses for old ones."""

        def run(self, begin: int = 0, end: int = ...) -> None:
            """Make calls [begin, end), all by default, without Python's lock."""

        def timed(self, begin: int, ends: Sequence[int], bell: Bell) -> list[float]:
            """Make calls from `begin` up to each of these ends, till the bell rings: each stretch's seconds.

            A signal's handler runs meanwhile, as between two lines of Python: Ctrl-C raises.
            """
            return []

    class Bell:
        """Calls whoever drives a tape away from it."""

        def after(self, seconds: float) -> None:
            """It rings by itself after so many seconds."""

        def ring(self) -> None:
            """Now, from any thread."""

else:
    Tape, Bell = lib.Tape, lib.Bell


class Own(NamedTuple):
    """What calls have of a layer's, or a linear's, own. Calls for two of one form differ in these addresses alone."""

    form: Hashable
    addresses: tuple[int, ...]
    """None of them 0, none twice."""


@contextlib.contextmanager
def holding(memory: Memory) -> Iterator[Tape]:
    """Kernels that this thread calls inside are noted and not run, their results lie in `memory`: `Tape.run` runs them.

    Whoever calls them keeps alive what else they point to, and calls nothing but kernels.
    """
    assert lib is not None
    tape = Tape()
    tape.holds = True
    lib.record(tape)
    try:
        with memory.lent():
            yield tape
    finally:
        lib.record(None)


@contextlib.contextmanager
def recording(memory: Memory) -> Iterator[Tape]:
    """The tape of what this thread does inside; it is whole, or not, at the end."""
    assert lib is not None
    tape = Tape()
    memory.begin()
    lib.record(tape)
    try:
        with _Operators(tape, memory):
            yield tape
    finally:
        lib.record(None)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """PyTorch's part of a recording."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not asked for: PyTorch's compiler, which nobody uses here, would be imported to be told to keep out (2 s)."""
        return False

    def __init__(self, tape: Tape, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape, self._memory = tape, memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        how = dict(kwargs or {})
        if func is _EMPTY and _is_plain_memory(**how):
            return self._memory.empty(args[0], how.get("dtype") or torch.get_default_dtype())
        with self:  # what is made of other operators is what they are
            made = func.decompose(*args, **how)
        if made is not NotImplemented:
            return made
        written, given = _aliases(func._schema.arguments), _aliases(func._schema.returns)
        if written.count(True) == 1 and given == [True]:
            self._tape.note(_bound(func, how), args)
        elif True in written or not given or given.count(False) < len(given):
            self._tape.is_whole = False
        return func(*args, **how)


def _is_plain_memory(dtype: Any = None, device: Any = None, layout: Any = None, pin_memory: Any = None) -> bool:
    usual = device in (None, torch.device("cpu")) and layout in (None, torch.strided)
    return usual and not pin_memory


def _aliases(values: Any) -> list[bool | None]:
    """Of each of an operator's inputs or results: whether it is written; None if it is no view of another one."""
    return [None if v.alias_info is None else bool(v.alias_info.is_write) for v in values]


def _bound(func: Any, how: Mapping[str, Any]) -> Callable[..., object]:
    return (lambda *args: func(*args, **how)) if how else func
