"""What a policy sees and says: segments, work units, events, plans, and the one law of legality.

A request's prefill is a grid of cells (token t, layer l). A segment is a rectangle of it, a work unit is segments that
run in one pass over the layers, a policy turns events into plans. All of it is plain data that survives JSON, so that
a run can be written down and replayed.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

if typing.TYPE_CHECKING:
    from firstlight.core.view import View

Kind = Literal["prefill", "decode"]
YieldAt = Literal["none", "slice", "op", "sublayer", "layer"]
PreemptHow = Literal["recompute", "park"]


@dataclass(frozen=True, slots=True)
class Segment:
    """The cells [t0, t1) x [l0, l1) of one request; `tok` counts original ordinals, also after a cut."""

    rid: str
    kind: Kind
    tok: tuple[int, int]
    layer: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Segments that share one pass over the layers; may be stopped at points of granularity `yield_at` or coarser."""

    uid: int
    segments: tuple[Segment, ...]
    yield_at: YieldAt = "none"
    lane: str = "main"


def legal(f: Sequence[int], segment: Segment, barriers: Sequence[int] = (), num_tokens: int = 0) -> bool:
    """The staircase law (design section 3). `f[l]` = ordinal below which every row alive at layer l has finished it.

    `barriers` are layers after which a cut needs all `num_tokens` prompt rows: nothing passes such a layer c before
    f[c] reaches the prompt's end, but for the pass that brings the whole prompt through it at once.
    """
    (t0, t1), (l0, l1) = segment.tok, segment.layer
    if not (0 <= t0 < t1 and 0 <= l0 < l1 <= len(f)):
        return False
    if f[l0:l1].count(t0) < l1 - l0 or (l0 > 0 and f[l0 - 1] < t1):
        return False
    one_shot = t0 == 0 and t1 == num_tokens
    return all(f[c] >= num_tokens or (l0 <= c and one_shot) for c in barriers if l1 > c + 1)


# --- events: every fact that a policy may read -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request came. `n_uncached` is an estimate; `need_blocks` is for the whole prompt and one token more."""

    rid: str
    n_tokens: int
    n_uncached: int
    need_blocks: int
    max_tokens: int
    whole_prompt: bool = False
    chunk: int | None = None
    barriers: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""
    ttft_slo_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Carried by every event but Arrival, Cancel and Timer: absolute figures after the event."""

    free_blocks: int
    parked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Admitted(Account):
    """The prefix was looked up and pinned, the prompt's blocks are reserved; `n_cached` tokens need no row."""

    rid: str
    n_cached: int


@dataclass(frozen=True, slots=True)
class NotAdmitted(Account):
    """The blocks were not there after all; the request is waiting again."""

    rid: str
    need_blocks: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Somebody asked to stop a request; its rows leave the running unit between layers, or end with it."""

    rid: str


@dataclass(frozen=True, slots=True)
class Cancelled(Account):
    """The request is gone: no block, no parked row is left of it."""

    rid: str
    reason: str = "cancelled"


@dataclass(frozen=True, slots=True)
class Preempted(Account):
    """The request stopped running: `recompute` lost its KV and starts again, `park` keeps all of it.

    `restart_dense` is never planned: a method failed, and the request starts again without any. `need_blocks` is what
    its return takes: after a loss of its KV the blocks of all known tokens and one more, else 0.
    """

    rid: str
    how: PreemptHow | Literal["restart_dense"]
    need_blocks: int = 0


@dataclass(frozen=True, slots=True)
class UnitDone(Account):
    """A unit ended, `dur` seconds after its submit or last resume; also one, yielded even, that lost all its requests.

    `sampled` tokens per request, blocks that the next token of each needs (`grow`), requests that are finished.
    """

    uid: int
    dur: float
    sampled: dict[str, int] = field(default_factory=dict)
    grow: dict[str, int] = field(default_factory=dict)
    finished: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitYielded(Account):
    """A unit stopped at `cursor` = (layer, operator), `dur` seconds after its submit or last resume, and waits."""

    uid: int
    cursor: tuple[int, str]
    dur: float


@dataclass(frozen=True, slots=True)
class Cut(Account):
    """Rows left a request after `layer`: `kept[i]` rows are alive of ordinals [64 i, 64 i + 64)."""

    rid: str
    layer: int
    kept: tuple[int, ...]
    n_parked: int


@dataclass(frozen=True, slots=True)
class Pinned(Account):
    """Between units, blocks went to documents or came back from them."""


@dataclass(frozen=True, slots=True)
class Timer:
    """The time a plan asked for with `wake_at` has come."""

    tag: str = ""


Event = (
    Arrival | Admitted | NotAdmitted | Cancel | Cancelled | Preempted | UnitDone | UnitYielded | Cut | Pinned | Timer
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy wants. Preemptions take effect first, then admissions, then units.

    `wake_at` of the latest plan is the only timer, None stops it. `memo` is the policy's own JSON state: the next view
    shows the latest plan's.
    """

    submit: tuple[WorkUnit, ...] = ()
    yield_: tuple[int, ...] = ()
    resume: tuple[int, ...] = ()
    admit: tuple[str, ...] = ()
    preempt: tuple[tuple[str, PreemptHow], ...] = ()
    wake_at: float | None = None
    memo: dict[str, Any] = field(default_factory=dict)


class Policy(Protocol):
    """Pure: no clock, no I/O, no randomness but `view.rng`. Called once a batch of events, never by polling."""

    def step(self, now: float, events: Sequence[Event], view: View) -> Plan: ...


class CostModel(Protocol):
    """Seconds that work will take; fitted from measurements."""

    def unit(self, unit: WorkUnit, view: View) -> float: ...


# --- JSON ------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Plain JSON of any type above; a dataclass becomes an object whose `type` is its name."""
    if hasattr(value, "__dataclass_fields__"):
        body = {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
        return {"type": type(value).__name__} | body
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def event_from_json(body: Mapping[str, Any]) -> Event:
    """The inverse of `to_json` for events. Raises KeyError or TypeError on what is not one."""
    cls, tuples = _event_types()[body["type"]]
    made: Event = cls(**{k: tuple(v) if k in tuples else v for k, v in body.items() if k != "type"})
    return made


@functools.cache
def _event_types() -> dict[str, tuple[Any, frozenset[str]]]:
    """Each event's class and its tuple fields: JSON knows lists only."""
    return {cls.__name__: (cls, _tuple_fields(cls)) for cls in typing.get_args(Event)}


def _tuple_fields(cls: Any) -> frozenset[str]:
    hints = typing.get_type_hints(cls)
    return frozenset(name for name, hint in hints.items() if typing.get_origin(hint) is tuple)
