"""Spans of a prompt whose K/V a source has: found at admission, loaded strip by strip as the layers come to them.

Loaded cells are written with the computed ones in one upsert, so that rows of the table stay whole; where a row is
computed too, it wins. Keys are turned to where their tokens stand now: rotations compose (CacheBlend, arXiv
2405.16444).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from firstlight.cache.table import RequestKV
from firstlight.core.parts import Cells, KVSource, PartContext, Span, SpanKV
from firstlight.models.decoder import Decoder


class Spans:
    """What a source has of one prompt."""

    def __init__(self, source: KVSource, ctx: PartContext) -> None:
        self._source = source
        self.found: Sequence[Span] = source.find(ctx)
        ends = [0, *(end for span in self.found for end in (span.lo, span.hi)), ctx.prompt_len]
        assert ends == sorted(ends), f"spans overlap or lie outside of the prompt: {self.found}"

    def spared(self, tok: Tensor) -> Tensor:
        """bool [n]: ordinals that need no row."""
        spared = torch.zeros(len(tok), dtype=torch.bool)
        for span in self.found:
            if span.fidelity == "exact":
                spared |= (tok >= span.lo) & (tok < span.hi)
        return spared

    def load(self, model: Decoder, layer: int, first: int, end: int) -> Cells | None:
        """The cells of ordinals [first, end) that the source has in a layer, ready to be written."""
        parts = []
        for span, lo, hi in self._within(first, end):
            given = self._source.load(span, layer)
            assert given is not None or span.fidelity != "exact", f"{span} has no cells in layer {layer}"
            if given is not None:
                parts.append(_turned(model, layer, given, span, slice(lo - span.lo, hi - span.lo)))
        if not parts:
            return None
        return Cells(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tok", "k", "v")))

    def hidden(self, layer: int, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tok [n], rows [n, D]) that can be revived into a layer, of ordinals [first, end)."""
        for span, lo, hi in self._within(first, end):
            if span.hidden_at == layer:
                rows = self._source.load_hidden(span)
                assert rows is not None, f"{span} has no hidden rows"
                yield torch.arange(lo, hi), rows[lo - span.lo : hi - span.lo]

    def offer(self, ctx: PartContext, kv: RequestKV) -> None:
        """Let the source take what it wants of a prefilled prompt's cells."""

        def read(layer: int) -> Cells:
            k, v = (t[:, : ctx.prompt_len].transpose(0, 1) for t in kv.entries(layer))
            return Cells(torch.arange(ctx.prompt_len), k, v)

        self._source.store(ctx, read)

    def _within(self, first: int, end: int) -> Iterator[tuple[Span, int, int]]:
        for span in self.found:
            lo, hi = max(span.lo, first), min(span.hi, end)
            if lo < hi:
                yield span, lo, hi


def joined(tok: Tensor, k: Tensor, v: Tensor, loaded: Cells) -> Cells:
    """Computed rows and loaded cells, sorted; of a token that is both the computed one."""
    more = ~torch.isin(loaded.tok, tok)
    every, order = torch.cat([tok, loaded.tok[more]]).sort()
    return Cells(
        every, torch.cat([k, loaded.k[more].to(k.dtype)])[order], torch.cat([v, loaded.v[more].to(v.dtype)])[order]
    )


def _turned(model: Decoder, layer: int, given: SpanKV, span: Span, part: slice) -> Cells:
    """The part of a span's cells with keys rotated for this prompt's positions."""
    tok = torch.arange(span.lo, span.hi)[part]
    turn = tok - given.pos[part] if given.rotated else tok
    k = given.k[part]
    if not given.rotated or bool(turn.any()):
        k = model.turn(layer, k, turn, again=given.rotated)
    return Cells(tok, k, given.v[part])
