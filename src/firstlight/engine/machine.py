"""What passes run on: the model, its operators, where rows wait, and how fast all that is on this computer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

from firstlight.core.schedule import WorkUnit, YieldAt
from firstlight.engine.park import ParkStore
from firstlight.engine.planning import Planning
from firstlight.engine.rates import SLICE_S, Rate
from firstlight.engine.steady import Steady
from firstlight.engine.work import Stop
from firstlight.kernels.tape import Bell
from firstlight.models.decoder import Decoder

_INSIDE_LAYERS: tuple[YieldAt, ...] = ("slice", "op", "sublayer")


@dataclass(slots=True, weakref_slot=True)
class Machine:
    """What passes run on: the model, the operators, the park store and the measured speeds."""

    model: Decoder
    ops: ModuleType
    park: ParkStore
    planning: Planning
    linear: Rate = field(default_factory=Rate)
    attention: Rate = field(default_factory=Rate)
    holds: bool = True
    """Whether a layer's calls may be noted first and made afterwards; not while somebody watches them."""
    bell: Bell = field(default_factory=Bell)
    """Rings when a pass should stop."""
    steady: Steady = field(init=False)

    def __post_init__(self) -> None:
        self.steady = Steady(self)

    def stride(self, unit: WorkUnit, rows: int, pairs: int) -> int:
        """Layers that a unit may do between two stops, with so many rows and (row, key) pairs; 0 = it stops inside."""
        seconds = self._seconds(rows, pairs)
        if unit.yield_at in _INSIDE_LAYERS or seconds > SLICE_S:
            return 0
        return int(SLICE_S / seconds) if unit.yield_at == "none" and rows else 1  # a cut may leave a layer no rows

    @property
    def pace(self) -> tuple[int, ...]:
        """What a layer's calls are cut by: with another one they are cut anew, attention where its speed doubles."""
        flops, own = self.model.layer_flops, self.model.qkv_flops
        rows = (self.linear.rows(work) for work in (own, flops - own))
        return (*rows, math.frexp(self.attention.per_second)[1])

    def observe(self, passed: Sequence[tuple[Stop, float]]) -> None:
        """What the stretch before each stop took."""
        self.attention.observe((stop.work, seconds) for stop, seconds in passed if stop.op == "attend")
        self.linear.observe((stop.work, seconds) for stop, seconds in passed if stop.op != "attend")

    def _seconds(self, rows: int, pairs: int) -> float:
        """A layer's predicted time, for so many rows and (row, key) pairs of dense attention."""
        c = self.model.config
        linear: float = self.model.layer_flops * rows
        attention = 4.0 * c.num_heads * c.head_dim * pairs
        return linear / self.linear.per_second + attention / self.attention.per_second
