"""The attention contract: what every backend's `attend` is given and what it gives back.

A backend is a module with `attend` of the signature of `Attend`. The reference defines the meaning, the others must
agree with it on any batch, any plan and any slicing of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from firstlight.core.attn import AttnPlan
from firstlight.kernels.kv_layout import KVLayout

SPLIT = 512
"""View entries that are reduced together; splits are merged in ascending order."""


@dataclass(frozen=True, slots=True)
class AttnRows:
    """The rows of B requests, request by request, ordinals ascending inside each."""

    row_ptr: Sequence[int]
    """[B+1] first row of each request."""
    tok: Tensor
    """i64 [N] ordinals: the causal test."""
    pos: Tensor
    """i64 [N] positions: windows."""
    decode: Sequence[bool]
    """[B] whether the rows are decode rows (ordinals at or past the prompt's end)."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What a backend worked out about these rows, for the next layer."""


@dataclass(slots=True)
class KVView:
    """What one request holds in one layer, by KV head: entries sorted by ordinal, spread over blocks of 64.

    Places of a block past the length hold finite numbers: the pool hands blocks out zeroed.
    """

    table: Tensor
    """i32 [Hkv, nb]: block numbers; 0 = nothing there."""
    length: Sequence[int]
    """[Hkv] entries of each head."""
    tok: Tensor | None = None
    """i64 [Hkv, max length] ordinals of the entries; None = identity: the ordinal is the entry's number."""
    pos: Tensor | None = None
    """i64 [Hkv, max length]; None exactly when `tok` is."""
    visible: Tensor | None = None
    """bool [Hkv, max length]: entries that this pass may read at all; None = all."""


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Which rows' attention is to be summed over keys, onto `colsum` (README-tokens-cache, `Obs`)."""

    first_tok: Sequence[int]
    """[B]: rows with ordinal >= this one are probe rows (a huge number: none)."""
    colsum: Sequence[Tensor | None]
    """[B] f32 [Hkv, n]: softmax mass on each view entry, added row by row in ordinal, then head order. Where rows skip
    blocks (`AttnPlan.skip_log`) those get exp(score - lse) too, with the lse of what was kept."""


@dataclass(slots=True)
class AttnStats:
    """(row, key, query head) triples: what dense would read, and what was read: listed and not skipped."""

    dense: int = 0
    visible: int = 0


@dataclass(slots=True)
class AttnCall:
    """Everything that a slice of one attention operator needs, apart from the slice."""

    q: Tensor
    """[N or more, Hq, D] after rotation; `rows` says how many count."""
    rows: AttnRows
    layout: KVLayout
    kv: Sequence[KVView]
    """[B]."""
    out: Tensor
    """[N or more, Hq, D], written."""
    scale: float
    plan: AttnPlan | None = None
    model_window: int | None = None
    """The row sees positions greater than its own minus this."""
    probe: ProbeRows | None = None
    score_cap: float | None = None
    """A scaled score s becomes cap * tanh(s / cap)."""
    lse: Tensor | None = None
    """f32 [N, Hq], written if given."""
    numbers: Any = None
    """`kv`, `plan` and `probe` as the backend's `view_numbers`, `plan_numbers` and its own write them (None = there is
    none): it does so once a call, or the caller keeps them up to date."""
    stats: AttnStats = field(default_factory=AttnStats)

    def num_read(self, i: int) -> int:
        """Keys that the rows of request i read without a plan: those that are there, and in the model's window."""
        tok, view = self.rows.tok[self.rows.row_ptr[i] : self.rows.row_ptr[i + 1]], self.kv[i]
        if view.tok is not None:
            counts = [torch.searchsorted(view.tok[h, :n], tok, right=True).sum() for h, n in enumerate(view.length)]
            return int(torch.stack(counts).sum()) // len(counts)
        key = ("read", i, self.model_window)
        if key not in self.rows.memo:
            before = tok if self.model_window is None else tok.clamp(max=self.model_window - 1)
            self.rows.memo[key] = int(before.sum()) + len(tok)
        return int(self.rows.memo[key])


class Attend(Protocol):
    """Attention of rows [r0, r1) of the call; the answer doesn't depend on how rows are sliced."""

    def __call__(self, call: AttnCall, r0: int, r1: int) -> None: ...
