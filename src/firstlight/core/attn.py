"""`AttnPlan`: which keys each (query tile, head list) sees. Planners say it in these words, kernels read them.

Set semantics (the definition that tests use). Key j is visible to row t of head h iff it is causal and inside the
model's own window and (j < sink or t - j < window or the block of j is listed or j is a listed column), all taken from
the row's list. Each key counts once, however many entries name it. A window of -1 makes the row dense; an empty set
gives output 0 and log-sum-exp -inf.

`blk_idx`, `col_idx` and `sink` count entries of the (request, layer, KV head) view, equal to ordinals as long as
nothing was dropped; the causal test compares stored ordinals, windows compare stored positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from firstlight.core.parts import Bound

if TYPE_CHECKING:
    from torch import Tensor

DENSE = -1


@dataclass(frozen=True, slots=True)
class AttnPlan:
    """One layer, one pass, a ragged batch of B requests. S slots, L head lists; CSR row = slot L + list.

    `None` in place of a plan is dense. Tile i of a request holds its rows with ordinal in [i q_tile, (i+1) q_tile);
    `tile_map[tile_base[b] + i - tile_first[b]]` is the slot of tile i of request b, so boundaries are absolute.
    """

    q_tile: int
    blk: int
    """Tokens of a listed block: a multiple or a divisor of the KV block's 64."""
    head_map: Tensor
    """i16 [Hq]: query head -> list."""
    tile_base: Tensor
    """i32 [B+1]: first entry of each request in `tile_map`."""
    tile_first: Tensor
    """i32 [B]: number of the first tile that the request has in this pass."""
    tile_map: Tensor
    """i32 [tiles]: -> slot."""
    band: Tensor
    """i32 [S*L, 2]: (sink tokens, window tokens); window -1 = dense row, (0, 0) = no band."""
    blk_ptr: Tensor | None = None
    """i32 [S*L + 1]."""
    blk_idx: Tensor | None = None
    """i32: block numbers, ascending and unique in a row."""
    col_ptr: Tensor | None = None
    col_idx: Tensor | None = None
    """i32: single entries, ascending and unique in a row."""
    skip_log: Tensor | None = None
    """f32 [B, Hq], 0 or less: a row skips a KV block where the highest score that it sees there, scaled and capped, is
    below the highest of all blocks before by more than -skip_log; -inf = never. What it skips, it doesn't see."""
    scan: int = 0
    """Order in which blocks of the view come before each other, for `skip_log`: 0 = ascending, 1 = descending, 2 = the
    view's first and then descending."""

    @property
    def num_lists(self) -> int:
        return int(self.head_map.max()) + 1

    @property
    def skips(self) -> bool:
        """Whether any row may skip what is listed."""
        return self.skip_log is not None and bool((self.skip_log > -math.inf).any())


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What a planner may look at: one request, one layer, the rows of one pass. Planners are pure given this."""

    layer: int
    q: Tensor
    """[n, Hq, D] after rotation."""
    tok: Tensor
    """i64 [n] ordinals, ascending."""
    pos: Tensor
    """i64 [n]."""
    num_kv_heads: int
    prompt_len: int
    is_last_chunk: bool
    keys: Callable[[], Tensor]
    """() -> [Hkv, n_kv, D]: the keys of the view, read only when asked for."""
    state: dict[str, Any]
    """The request's scratch for this method; dropped with the request."""
    place: Tensor | None = None
    """i64 [n]: the number of each row's own entry in the view, and so the last entry that it may read. Equal to `tok`
    as long as nothing was dropped; None where heads hold different entries."""
    scale: float = 1.0
    """What a product of query and key is multiplied by."""
    digest: Callable[[str], Tensor] | None = None
    """name -> [Hkv, nb, ...]: a summary of each of the view's blocks that the capability names (`cache/digests.py`)."""
    entries: Callable[[], tuple[Tensor, Tensor]] | None = None
    """() -> k, v [Hkv, n_kv, D] of the view."""
    product: Callable[[int, Tensor, Tensor], None] | None = None
    """(KV head, rows f32 [m, D], out f32 [m, n]): what `by_keys` does, where keys needn't be read out for it."""

    def by_keys(self, head: int, rows: Tensor, out: Tensor) -> None:
        """out f32 [m, n]: rows f32 [m, D] by the first n keys of a KV head."""
        if self.product is None:
            out.copy_(rows @ self.keys()[head, : out.shape[1]].float().T)
        else:
            self.product(head, rows, out)

    @property
    def is_decode(self) -> bool:
        """Whether the rows are of generated tokens."""
        return int(self.tok[-1]) >= self.prompt_len


class Planner(Bound):
    """The attention/ part of a method: which keys a row reads."""

    prompt_only: bool = False
    """Generated tokens stay dense: `plan` is asked about rows of the prompt alone."""
    by_place: bool = False
    """Plans of generated tokens follow from their ordinals: one does for up to 64 tokens, and is that of the last of
    them. Asked for it, `plan` gets queries that mean nothing, and a view in which these tokens aren't yet."""

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """A plan for this one request (B = 1), or None for dense."""
        return None

    def operations(self, ctx: PlanContext) -> float:
        """Multiplications and additions that `plan` will spend on this: what the cost guard reckons with."""
        return 0.0

    def fallback(self, ctx: PlanContext) -> AttnPlan | None:
        """What rows read where `plan` would take more time than it saves; None = all."""
        return None

    def rehearse(self, ctx: PlanContext) -> float:
        """Do what takes most of `plan`'s time, and say how many `operations` that was: the guard takes the time of one.

        0 = nothing was done: one takes what it does in attention/probe.py.
        """
        return 0.0
