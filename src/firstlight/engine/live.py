"""A request inside the engine: its tokens, its K/V, its staircase, and the stamps from which its report is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from firstlight.attention.joined import joined
from firstlight.cache.table import RequestKV
from firstlight.core.attn import Planner
from firstlight.core.parts import KVSource, Obs, PartContext, Retention, RowPolicy
from firstlight.core.registry import Part
from firstlight.core.request import FinishReason, Request
from firstlight.core.schedule import Segment
from firstlight.decode.state import Decoding
from firstlight.engine.guard import Guarded
from firstlight.engine.spans import Spans
from firstlight.kernels.contract import AttnStats


@dataclass(slots=True)
class Stamps:
    """Seconds on the engine's clock; 0 = not yet."""

    arrived: float = field(default_factory=time.perf_counter)
    reuse_s: float = 0.0
    first_unit: float = 0.0
    prefilled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


class LiveRequest:
    """State of one request from arrival to end."""

    def __init__(self, request: Request, kv: RequestKV, num_layers: int, parts: Sequence[Part], seed: int) -> None:
        self.request, self.rid, self.kv = request, request.rid, kv
        self.ids = list(request.prompt_ids)
        self.num_prompt = len(self.ids)
        self.decoding = Decoding(request, seed)
        self.cancelled = False
        self.finish_reason: FinishReason | None = None
        self.stamps = Stamps()
        self.fallback = ""
        """Why it is computed without the methods that were asked for; empty: it isn't."""
        self.dense_from = 0
        """How many tokens a method had chosen by then."""
        self._use(parts)
        self.miss_reason = ""
        self.kv_end = 0
        self.num_preempted = 0
        self._start(num_layers)

    def _use(self, parts: Sequence[Part]) -> None:
        def of(seam: str) -> list[Any]:
            return [Guarded(self.rid, part) for part in parts if part.seam == seam]

        self.policies: list[RowPolicy] = of("tokens")
        self.planner: Planner | None = joined(of("attention"))
        self.retention: Retention | None = next(iter(of("cache")), None)
        self.source: KVSource | None = next(iter(of("reuse")), None)
        self._governs_decode = not all(policy.prompt_only for policy in self.policies)
        self.acts_inside = any(_acts_inside(part.impl) for part in parts if part.seam == "tokens")
        """Whether a row policy has a say inside layers, not at their ends alone."""
        self.barriers = tuple(sorted({c for policy in self.policies for c in policy.barriers()}))

    def _start(self, num_layers: int) -> None:
        self.f = [0] * num_layers
        self.n_cached = 0
        self.held = 0
        """Ordinals below this have exact cells: a row of theirs is computed for its output and not written."""
        self.gone = [0] * num_layers
        """Prompt rows that never reach each layer."""
        self.computed = [0] * num_layers
        """Prompt cells computed so far in each layer, those in decode steps included."""
        self.reused = 0
        """Prompt cells that a source gave and that stayed."""
        self.spans: Spans | None = None
        self.parked_cells = 0
        """Prompt cells above rows that wait in the park store, at the end."""
        self.contexts = [PartContext(self.rid, self.num_prompt, num_layers, ids=self.ids) for _ in self.policies]
        self.retention_context = PartContext(self.rid, self.num_prompt, num_layers, ids=self.ids)
        self.source_context = PartContext(self.rid, self.num_prompt, num_layers, ids=self.request.prompt_ids)
        self.planner_state: dict[str, Any] = {}
        self.planned = 0
        """Layers of passes that a plan served."""
        self.unplanned = 0
        """Those of the prompt where one would not have paid."""
        self.seen: dict[int, Obs] = {}
        """Layer -> probe sums so far, until the prompt's end."""
        self.stats = AttnStats()

    def restart(self) -> None:
        """Forget everything that a recompute makes anew; generated tokens are kept."""
        self.num_preempted += 1
        self._start(len(self.f))

    def fall_back(self, reason: str, kv: RequestKV) -> None:
        """Go on dense, from the beginning, in a table that keeps everything."""
        self.fallback, self.kv, self.dense_from = reason, kv, self.num_generated
        self._use(())
        self.restart()

    def is_governed(self, decode: bool) -> bool:
        """Whether row policies have a say in rows of the prompt, or of generated tokens."""
        return self._governs_decode if decode else bool(self.policies)

    def new_entries(self, segment: Segment) -> int:
        """How many entries a segment adds to a row of the table at most; an identity may hold some of them already.

        0 also where the one that it adds has its place.
        """
        first, end = segment.tok
        if end - first == 1 and self.kv.has_place(first):
            return 0
        return max(end - int(self.kv.length[segment.layer[0], 0]), 0) if self.kv.is_identity else end - first

    def settle(self) -> int:
        """After a pass: blocks that the next token's row takes beyond what is reserved."""
        if self.f[-1] == self.num_known - 1:
            if self.kv.has_place(self.f[-1]):
                return 0
            self.kv.settle()
        return max(self.kv.missing((0, len(self.f)), 1) - self.kv.reserved, 0)

    @property
    def num_known(self) -> int:
        """Prompt and generated tokens."""
        return len(self.ids)

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_prompt


def _acts_inside(policy: Any) -> bool:
    """Whether a row policy has hooks of its own that are called inside a layer."""
    hooks = ("before_layer", "on_kv", "after_attend")
    return any(getattr(getattr(policy, hook), "__func__", None) is not getattr(RowPolicy, hook) for hook in hooks)
