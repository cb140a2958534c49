"""Admission: may a request run, what of its prompt is known already, what is promised to it, what it leaves to others.

Between a request's arrival and its first row. The policy decides when; this says what it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from firstlight.cache.pool import Ids, Pool
from firstlight.cache.table import RequestKV, blocks_for
from firstlight.cache.windows import Windows
from firstlight.core.config import format_bytes
from firstlight.core.errors import UserError
from firstlight.core.registry import Part, recipe
from firstlight.core.request import Known, Request
from firstlight.core.schedule import Arrival
from firstlight.core.view import ViewConfig
from firstlight.engine.live import LiveRequest
from firstlight.engine.pins import Pins
from firstlight.engine.spans import Spans
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
    max_context: int | None = None
    """What the model was made for, which no setting can raise."""


class Admission:
    """Requests in, over one pool and maybe a prefix cache."""

    def __init__(
        self, pool: Pool, config: ViewConfig, limits: Limits, parts: Sequence[Part], cache: PrefixCache | None
    ) -> None:
        self.pool, self.config, self.limits, self.parts, self.cache = pool, config, limits, list(parts), cache
        self._last_rows = max((p.capability.last_rows for p in parts), default=0)
        self._publishes = all(p.capability.prefix_stable for p in parts)
        self.windows = self._windows()
        self._chunk = _chunk(parts)
        self._lasting = config.blocks_per_column - (0 if self.windows is None else int(self.windows.rows.sum()))
        """Blocks of a column that a request holds until it ends."""
        self.pins = Pins(pool)
        self.root = b""
        """Where this engine's chains of columns begin: model, dtype, recipe."""
        if cache is not None:
            pool.reclaim = cache.evict
            self.root = cache.root(limits.model_digest, str(pool.layout.dtype), recipe(parts))

    def _windows(self) -> Windows | None:
        """Table rows that are freed behind a window: of the model's local layers, or of a method's streaming heads.

        Parts that cut, revive or keep cells choose among all of them: for these nothing goes.
        """
        retentions = [p.impl for p in self.parts if p.seam == "cache"]
        if any(p.seam == "tokens" for p in self.parts):
            return None
        if retentions:
            streams = retentions[0].streams()
            return None if streams is None else Windows.streaming(streams)
        heads = self.config.blocks_per_column // self.config.num_layers
        return Windows.of(self.limits.windows, heads, cached=self.cache is not None and self._publishes)

    def open(self, request: Request) -> LiveRequest:
        """A request's state. Raises UserError if its length alone forbids it."""
        tokens, limit = len(request.prompt_ids), self.limits.max_model_len
        if tokens == 0:
            raise UserError("the prompt is empty; give at least one token")
        if tokens >= limit:
            cure = "shorten it" if limit == self.limits.max_context else "shorten it or raise max_model_len"
            raise UserError(f"the prompt has {tokens} tokens, the limit is {limit - 1}; {cure}")
        return LiveRequest(request, self.table(self.windows), self.config.num_layers, self.parts, self.limits.seed)

    def table(self, windows: Windows | None = None) -> RequestKV:
        """A request's empty table."""
        layers = self.config.num_layers
        return RequestKV(self.pool, layers, self.config.blocks_per_column // layers, windows)

    def check_room(self, live: LiveRequest) -> None:
        """Raises UserError if a request could not run even alone beside the documents.

        Documents come and go on another thread: each side makes itself known before it looks for the other.
        """
        need, left = self.need(live), self._left()
        if need > left:
            have, lack = (format_bytes(n * self.pool.block_nbytes) for n in (left, need))
            beside = " beside the documents" if self.pins.num_blocks else ""
            raise UserError(f"the prompt's KV needs {lack}, the pool has {have}{beside}; give more with --kv-memory")

    def has_room(self, live: LiveRequest) -> bool:
        """Whether a request could run alone."""
        return self.need(live) <= self._left()

    def arrival(self, live: LiveRequest) -> Arrival:
        """What the policy is told of a new request."""
        request, capabilities = live.request, [p.capability for p in self.parts]
        known = request.known.num_tokens if request.known else 0
        return Arrival(
            rid=live.rid,
            n_tokens=live.num_prompt,
            n_uncached=live.num_prompt - known,
            need_blocks=self.need(live),
            max_tokens=request.sampling.max_tokens,
            whole_prompt=any(c.whole_prompt for c in capabilities),
            chunk=self._chunk,
            barriers=live.barriers,
            priority=request.priority,
            tenant=request.tenant,
            ttft_slo_s=request.ttft_slo_s,
        )

    def blocks(self, live: LiveRequest, tokens: int) -> int:
        """Blocks that a request of so many tokens holds at most: whole columns, less what goes behind windows."""
        if (windows := live.kv.windows) is not None:
            # Generated tokens are computed again in one pass after a preemption, whatever the chunk.
            passing = live.num_prompt if self._chunk is None else min(self._chunk, live.num_prompt)
            return windows.promise(tokens, max(passing, tokens - live.num_prompt))
        return int(blocks_for(tokens)) * self.config.blocks_per_column

    def need(self, live: LiveRequest) -> int:
        """Blocks that a request takes when it starts: its tokens, one more, without what it shares of a document."""
        return self.blocks(live, live.num_known + 1) - self._shared(live, self._document(live))

    def _shared(self, live: LiveRequest, hit: Hit) -> int:
        """Blocks of a hit that stay shared. A retention rewrites what it keeps; what goes behind a window goes."""
        return 0 if live.retention is not None else len(hit.columns) * self._lasting

    def is_full(self, live: LiveRequest) -> bool:
        """Whether a request ends here: at the context's end, or where the pool has no column more for it."""
        tokens, block = live.num_known, self.config.block_size
        if tokens >= self.limits.max_model_len or tokens % block:
            return tokens >= self.limits.max_model_len
        return self.blocks(live, tokens + block) > self._left() + self._shared(live, self._document(live))

    def _left(self) -> int:
        """Blocks that one request alone could have."""
        return self.pool.total - self.pins.num_blocks

    def check_documents(self) -> None:
        """Raises UserError if a method in use leaves cells out, or makes them depend on what comes later."""
        for part in self.parts:
            if part.seam in ("tokens", "cache") or not part.capability.prefix_stable:
                raise UserError(
                    f"{part.method} needs the whole prompt, and a document comes without its questions; "
                    "leave the method out"
                )

    def keep(self, live: LiveRequest, others: Iterable[LiveRequest]) -> Known | None:
        """Pin a prefilled prompt's cells. None if others that were let in could then never run."""
        assert live.kv.is_identity, "a document's cells are whole"
        table = live.kv.table[:, :, : int(blocks_for(live.num_prompt))].copy()
        if self.windows is not None:  # of windows only the last is of use
            table[self.windows.layers, :, : self.windows.first(live.num_prompt)] = 0
        known = self.pins.add(table, live.num_prompt)
        if all(self.need(other) <= self._left() for other in others):
            return known
        self.pins.release(known)
        return None

    def load(self, held: Ids, num_tokens: int, fill: Callable[[Ids], None], others: Iterable[LiveRequest]) -> Known:
        """Pin cells from elsewhere: `fill` writes blocks for each true place of bool `held` [L, Hkv, columns].

        Raises UserError if there is no room for them beside `others`.
        """
        count, free = int(np.count_nonzero(held)), self.pool.available
        table = np.zeros(held.shape, np.int32)
        if count <= free:
            ids = table[held] = self.pool.take(count)
            known = self.pins.add(table, num_tokens)
            self.pool.release(ids)
            if all(self.need(other) <= self._left() for other in others):
                fill(table)
                return known
            self.pins.release(known)
        lack, have = (format_bytes(n * self.pool.block_nbytes) for n in (count, free))
        raise UserError(f"the document's KV needs {lack}, {have} is free; give more with --kv-memory")

    def admit(self, live: LiveRequest) -> bool:
        """Look the prefix up and pin it, reserve the rest of the prompt's blocks. False if they aren't there."""
        began = time.perf_counter()
        sure, hit = self._document(live), self._find(live)
        if live.request.known and hit.num_tokens <= sure.num_tokens:
            hit = sure
        got = next((tried for tried in self._tries(live, hit, sure) if self._adopt(live, tried)), None)
        if got is None:
            return False
        held = got.num_tokens
        live.miss_reason = hit.reason
        if held < hit.num_tokens:
            live.miss_reason = f"no room for more than {held} cached tokens beside what is new"
        live.held, live.n_cached = held, max(0, min(held, live.num_prompt - self._fresh_rows(live)))
        live.f = [live.n_cached] * len(live.f)
        if live.source is not None:
            live.spans = Spans(live.source, live.source_context)
        if not live.stamps.first_unit:  # once it runs, admissions after a preemption are no wait for a first row
            live.stamps.reuse_s += time.perf_counter() - began
        return True

    def _tries(self, live: LiveRequest, hit: Hit, sure: Hit) -> Iterator[Hit]:
        """What a hit pins may be all that the rest could have been put into: then less of it must do.

        `sure` is what the request brings: others can't have put anything there.
        """
        yield hit
        whole = len(hit.columns) * self.config.block_size
        if hit is not sure and hit.partial is not None and whole > sure.num_tokens:
            yield self._find(live, whole)
        if hit.num_tokens > sure.num_tokens:
            yield sure

    def _adopt(self, live: LiveRequest, hit: Hit) -> bool:
        """Begin with the hit's tokens and reserve the rest; False, and nothing done, if it can't be."""
        block, held, whole = self.config.block_size, hit.num_tokens, hit.columns
        # The last column is only begun: the request gets a copy, since it will write into it.
        source = hit.partial
        pinned = [column.ravel() for column in (*whole, source) if column is not None]
        for column in pinned:
            self.pool.hold(column)
        need = self.blocks(live, live.num_known + 1) - self._shared(live, hit)
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

    def _document(self, live: LiveRequest) -> Hit:
        """What the request brings itself; nothing if it asks about no document."""
        known, block = live.request.known, self.config.block_size
        if known is None:
            return Hit()
        table = known.table
        if self.windows is not None:
            end = min(known.num_tokens, live.num_prompt - self._fresh_rows(live))
            first, local = max(0, end - self.windows.size + 1) // block, self.windows.layers
            if (table[local, :, first:] == 0).any():
                return Hit(reason=f"the document keeps no window at token {end}")
            table = table.copy()
            table[local, :, :first] = 0
        whole, rest = divmod(known.num_tokens, block)
        columns = tuple(table[:, :, number] for number in range(whole))
        partial = table[:, :, whole] if rest else None
        return Hit(columns, partial, known.num_tokens, f"the document ends at token {known.num_tokens}")

    def _find(self, live: LiveRequest, limit: int | None = None) -> Hit:
        """What the prefix cache holds of a prompt's first `limit` tokens (None: of all), and why not more."""
        if self.cache is None:
            return Hit(reason="the prefix cache is off")
        if not self._publishes or live.barriers or live.fallback:
            return Hit(reason=live.fallback or "a method in use makes cells that depend on later tokens")
        window = None if self.windows is None else self.windows.size
        return self.cache.match(self.root, live.request.prompt_ids, self._fresh_rows(live), window, limit)

    def known(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt's beginning that whole columns of the prefix cache hold. Any thread may ask."""
        return self.cache.held(self.root, ids) if self.cache is not None and self._publishes else 0

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
        serves = self._publishes and not live.barriers and not live.fallback  # a fallback's cells are of no recipe here
        if self.cache is not None and serves and live.kv.is_identity:
            self.cache.publish(self.root, live.ids[:tokens], live.kv.column)


def _chunk(parts: Sequence[Part]) -> int | None:
    """The longest pass that the parts let a prompt have; None = all of it."""
    capabilities = [p.capability for p in parts]
    if any(c.whole_prompt for c in capabilities):
        return None
    return min((c.chunk for c in capabilities if c.chunk is not None), default=None)
