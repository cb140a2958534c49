"""Admission: may a request run, what of its prompt is known already, what is promised to it, what it leaves to others.

Between a request's arrival and its first row. The policy decides when; this says what it takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from firstlight.cache.pool import Pool
from firstlight.cache.table import RequestKV, blocks_for
from firstlight.core.config import format_bytes
from firstlight.core.errors import UserError
from firstlight.core.registry import Part, recipe
from firstlight.core.request import Request
from firstlight.core.schedule import Arrival
from firstlight.core.view import ViewConfig
from firstlight.engine.live import LiveRequest
from firstlight.reuse.prefix import Hit, PrefixCache


@dataclass(frozen=True)
class Limits:
    """What requests must fit."""

    max_model_len: int
    seed: int = 0
    deterministic: bool = False
    model_digest: str = ""


class Admission:
    """Requests in, over one pool and maybe a prefix cache."""

    def __init__(
        self, pool: Pool, config: ViewConfig, limits: Limits, parts: Sequence[Part], cache: PrefixCache | None
    ) -> None:
        self.pool, self.config, self.limits, self.parts, self.cache = pool, config, limits, list(parts), cache
        self._last_rows = max((p.capability.last_rows for p in parts), default=0)
        self._publishes = all(p.capability.prefix_stable for p in parts)
        self.root = b""
        """Where this engine's chains of columns begin: model, dtype, recipe."""
        if cache is not None:
            pool.reclaim = cache.evict
            self.root = cache.root(limits.model_digest, str(pool.layout.dtype), recipe(parts))

    def open(self, request: Request) -> LiveRequest:
        """A request's state. Raises UserError if it can never run."""
        tokens, limit = len(request.prompt_ids), self.limits.max_model_len
        if tokens == 0:
            raise UserError("the prompt is empty; give at least one token")
        if tokens >= limit:
            raise UserError(
                f"the prompt has {tokens} tokens, the limit is {limit - 1}; shorten it or raise max_model_len"
            )
        need = self.blocks(tokens + 1)
        if need > self.pool.total:
            have, lack = (format_bytes(n * self.pool.block_nbytes) for n in (self.pool.total, need))
            raise UserError(f"the prompt's KV needs {lack}, the pool has {have}; give more with --kv-memory")
        layers = self.config.num_layers
        kv = RequestKV(self.pool, layers, self.config.blocks_per_column // layers)
        return LiveRequest(request, kv, layers, self.parts, self.limits.seed)

    def arrival(self, live: LiveRequest) -> Arrival:
        """What the policy is told of a new request."""
        request, capabilities = live.request, [p.capability for p in self.parts]
        return Arrival(
            rid=live.rid,
            n_tokens=live.num_prompt,
            n_uncached=live.num_prompt,
            need_blocks=self.blocks(live.num_prompt + 1),
            max_tokens=request.sampling.max_tokens,
            whole_prompt=any(c.whole_prompt for c in capabilities),
            chunk=min((c.chunk for c in capabilities if c.chunk is not None), default=None),
            barriers=live.barriers,
            priority=request.priority,
            tenant=request.tenant,
            ttft_slo_s=request.ttft_slo_s,
        )

    def blocks(self, tokens: int) -> int:
        """Blocks of whole columns for so many tokens."""
        return int(blocks_for(tokens)) * self.config.blocks_per_column

    def longest(self) -> int:
        """Tokens at which a request ends: the context, or all that the pool could hold of it alone."""
        columns = self.pool.total // self.config.blocks_per_column
        return min(self.limits.max_model_len, columns * self.config.block_size)

    def admit(self, live: LiveRequest) -> bool:
        """Look the prefix up and pin it, reserve the rest of the prompt's blocks. False if they aren't there."""
        began = time.perf_counter()
        hit, block = self._find(live), self.config.block_size
        most = min(hit.num_tokens, live.num_prompt)
        # What a hit pins may be all that the rest could have been put into: then less of it must do.
        tries = dict.fromkeys((most, most // block * block, 0))
        held = next((tokens for tokens in tries if self._adopt(live, hit, tokens)), None)
        if held is None:
            return False
        if held < most:
            live.miss_reason = f"no room for more than {held} cached tokens beside what is new"
        reusable = 0 if live.request.recompute_cached else live.num_prompt - max(1, self._last_rows)
        live.held, live.n_cached = held, max(0, min(held, reusable))
        live.f = [live.n_cached] * len(live.f)
        if not live.stamps.first_unit:  # once it runs, admissions after a preemption are no wait for a first row
            live.stamps.reuse_s += time.perf_counter() - began
        return True

    def _adopt(self, live: LiveRequest, hit: Hit, held: int) -> bool:
        """Begin with the hit's first `held` tokens and reserve the rest; False, and nothing done, if it can't be."""
        block, per_column = self.config.block_size, self.config.blocks_per_column
        whole = hit.columns[: held // block]
        # The last column is only begun: the request gets a copy, since it will write into it.
        source = hit.partial if held % block else None
        pinned = [column.ravel() for column in (*whole, source) if column is not None]
        for column in pinned:
            self.pool.hold(column)
        # A retention rewrites what it keeps, so in the end nothing is shared.
        shared = 0 if live.retention is not None else len(whole) * per_column
        need = self.blocks(live.num_known + 1) - shared
        if need > self.pool.available:
            for column in pinned:
                self.pool.release(column)
            return False
        live.kv.adopt(whole, len(whole) * block)
        live.kv.reserve(need)
        if source is not None:
            live.kv.copy_column(source, held)
            self.pool.release(source.ravel())
        return True

    def _find(self, live: LiveRequest) -> Hit:
        """What the prefix cache holds of a prompt, and why not more."""
        if self.cache is None:
            live.miss_reason = "the prefix cache is off"
            return Hit()
        if not self._publishes or live.barriers:
            live.miss_reason = "a method in use makes cells that depend on later tokens"
            return Hit()
        hit = self.cache.match(self.root, live.request.prompt_ids)
        live.miss_reason = hit.reason
        return hit

    def publish_prompt(self, live: LiveRequest) -> None:
        """A prefilled prompt's full columns serve others from now on; nobody writes them any more."""
        self._publish(live, live.num_prompt // self.config.block_size * self.config.block_size)

    def publish_all(self, live: LiveRequest) -> None:
        """What a finished request leaves: in deterministic mode no generated token, whose cells a decode row made."""
        self._publish(live, live.num_prompt if self.limits.deterministic else live.f[-1])

    def _publish(self, live: LiveRequest, tokens: int) -> None:
        if self.cache is not None and self._publishes and not live.barriers and live.kv.is_identity:
            self.cache.publish(self.root, live.ids[:tokens], live.kv.column)
