"""What reuse/ and engine/ ask of the block pool. Block numbers are i32 numpy arrays; 0 is nobody's block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BlockPool(Protocol):
    """Counts who holds a block: requests by number, the prefix cache by a mark."""

    def hold(self, ids: NDArray[Any]) -> None:
        """One request more holds these blocks."""
        ...

    def release(self, ids: NDArray[Any]) -> int:
        """One request fewer; what nobody holds and no cache marks is free. How many blocks nobody holds any more."""
        ...

    def mark(self, ids: NDArray[Any]) -> None:
        """The cache keeps these blocks."""
        ...

    def unmark(self, ids: NDArray[Any]) -> None:
        """The cache lets these blocks go."""
        ...

    def num_idle(self, ids: NDArray[Any]) -> int:
        """How many of them no request holds: what letting them go would free."""
        ...
