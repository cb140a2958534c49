"""Admission: may a request run, what of its prompt is known already, what is promised to it, what it leaves to others.

Between a request's arrival and its first row. The policy decides when; this says what it takes.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from firstlight.cache.pool import Pool
from firstlight.cache.table import RequestKV, blocks_for
from firstlight.cache.windows import Windows
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
    windows: tuple[int | None, ...] = ()
    """The window of each layer; None = reads all."""


class Admission:
    """Requests in, over one pool and maybe a prefix cache."""

    def __init__(
        self, pool: Pool, config: ViewConfig, limits: Limits, parts: Sequence[Part], cache: PrefixCache | None
    ) -> None:
        self.pool, self.config, self.limits, self.parts, self.cache = pool, config, limits, list(parts), cache
        self._last_rows = max((p.capability.last_rows for p in parts), default=0)
        self._publishes = all(p.capability.prefix_stable for p in parts)
        # Parts that cut, revive or keep cells choose among all of them: for these nothing goes behind a window.
        keeps_all = any(p.seam in ("tokens", "cache") for p in parts)
        self.windows = None if keeps_all else Windows.of(limits.windows, cached=cache is not None and self._publishes)
        local = 0 if self.windows is None else int(self.windows.layers.sum())
        self._lasting = config.blocks_per_column // config.num_layers * (config.num_layers - local)
        """Blocks of a column that a request holds until it ends."""
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
        kv = RequestKV(self.pool, layers, self.config.blocks_per_column // layers, self.windows)
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
        """Blocks that a request of so many tokens holds at most: whole columns, less what goes behind windows."""
        if self.windows is not None:
            return self.windows.promise(tokens, self.config.blocks_per_column // self.config.num_layers)
        return int(blocks_for(tokens)) * self.config.blocks_per_column

    def longest(self) -> int:
        """Tokens at which a request ends: the context, or all that the pool could hold of it alone."""
        block = self.config.block_size
        columns = range(1, self.limits.max_model_len // block + 2)
        fitting = bisect_right(columns, self.pool.total, key=lambda n: self.blocks(n * block))
        return min(self.limits.max_model_len, fitting * block)

    def admit(self, live: LiveRequest) -> bool:
        """Look the prefix up and pin it, reserve the rest of the prompt's blocks. False if they aren't there."""
        began = time.perf_counter()
        hit = self._find(live)
        got = next((tried for tried in self._tries(live, hit) if self._adopt(live, tried)), None)
        if got is None:
            return False
        held = got.num_tokens
        live.miss_reason = hit.reason
        if held < hit.num_tokens:
            live.miss_reason = f"no room for more than {held} cached tokens beside what is new"
        live.held, live.n_cached = held, max(0, min(held, live.num_prompt - self._fresh_rows(live)))
        live.f = [live.n_cached] * len(live.f)
        if not live.stamps.first_unit:  # once it runs, admissions after a preemption are no wait for a first row
            live.stamps.reuse_s += time.perf_counter() - began
        return True

    def _tries(self, live: LiveRequest, hit: Hit) -> Iterator[Hit]:
        """What a hit pins may be all that the rest could have been put into: then less of it must do."""
        yield hit
        if hit.partial is not None:
            yield self._find(live, len(hit.columns) * self.config.block_size)
        if hit.num_tokens:
            yield Hit()

    def _adopt(self, live: LiveRequest, hit: Hit) -> bool:
        """Begin with the hit's tokens and reserve the rest; False, and nothing done, if it can't be."""
        block, held, whole = self.config.block_size, hit.num_tokens, hit.columns
        # The last column is only begun: the request gets a copy, since it will write into it.
        source = hit.partial
        pinned = [column.ravel() for column in (*whole, source) if column is not None]
        for column in pinned:
            self.pool.hold(column)
        # A retention rewrites what it keeps, so in the end nothing is shared. Nor is what goes behind a window.
        shared = 0 if live.retention is not None else len(whole) * self._lasting
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

    def _find(self, live: LiveRequest, limit: int | None = None) -> Hit:
        """What the prefix cache holds of a prompt's first `limit` tokens (None: of all), and why not more."""
        if self.cache is None:
            return Hit(reason="the prefix cache is off")
        if not self._publishes or live.barriers:
            return Hit(reason="a method in use makes cells that depend on later tokens")
        window = None if self.windows is None else self.windows.size
        return self.cache.match(self.root, live.request.prompt_ids, self._fresh_rows(live), window, limit)

    def _fresh_rows(self, live: LiveRequest) -> int:
        """Rows at the prompt's end that are computed, whatever is held."""
        return live.num_prompt if live.request.recompute_cached else max(1, self._last_rows)

    def publish_prompt(self, live: LiveRequest) -> None:
        """A prefilled prompt's full columns serve others from now on; nobody writes them any more."""
        self._publish(live, live.num_prompt // self.config.block_size * self.config.block_size)

    def publish_all(self, live: LiveRequest) -> None:
        """What a finished request leaves: in deterministic mode no generated token, whose cells a decode row made."""
        self._publish(live, live.num_prompt if self.limits.deterministic else live.f[-1])

    def _publish(self, live: LiveRequest, tokens: int) -> None:
        if self.cache is not None and self._publishes and not live.barriers and live.kv.is_identity:
            self.cache.publish(self.root, live.ids[:tokens], live.kv.column)
