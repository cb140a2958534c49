"""Surprisal of a prompt's tokens under the model itself, before the prompt is admitted: what prompt editors score by.

Beside the engine's loop: it runs on the thread that asks, with K/V of its own that are gone with the edit. The hidden
rows of any layer can be looked at through the model's head (logit lens), so that a part of the model is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlight.engine.rates import padded
from firstlight.kernels.contract import AttnCall, AttnRows, KVView
from firstlight.kernels.kv_layout import BLOCK, KVLayout
from firstlight.models.decoder import Decoder

_ROWS = 512
"""Rows of a pass; between two passes somebody may stop it."""
_HEAD_ROWS = 64


class ModelScorer:
    """`Scorer` over a model. `check` is called now and then, and raises when nobody waits for the answer any more.

    It keeps the K/V of the last call's ids: what the next ones share with them from the start isn't computed again.
    """

    def __init__(self, model: Decoder, check: Callable[[], None] = lambda: None) -> None:
        self._model, self._check = model, check
        self._layers = 0
        self._ids: list[int] = []
        self._columns = 0
        self._layout = KVLayout(1, model.config.head_dim, model.dtype)
        self._table = torch.empty(0)
        """i32 [layers, Hkv, columns]."""

    def nll(
        self, ids: Sequence[int], *, first: int = 0, layers: int | None = None, among: Sequence[int] | None = None
    ) -> list[float]:
        """See `Scorer`."""
        begin = max(first, 1)
        if begin >= len(ids):
            return [0.0] * (len(ids) - first)
        depth = self._model.config.num_layers if layers is None else layers
        x = self._hidden(list(ids), begin - 1, depth)[:-1]
        tokens = None if among is None else torch.tensor(sorted(set(among)))
        want = torch.tensor(ids[begin:])
        place = want if tokens is None else torch.searchsorted(tokens, want)
        found = [0.0] * (begin - first)
        for a in range(0, len(x), _HEAD_ROWS):
            self._check()
            logits = self._model.lens(x[a : a + _HEAD_ROWS], tokens)
            right = logits.gather(1, place[a : a + _HEAD_ROWS, None])[:, 0]
            found += (logits.logsumexp(-1) - right).tolist()
        return found

    def _hidden(self, ids: list[int], first: int, layers: int) -> Tensor:
        """Rows of `ids[first:]` as they leave the last of the layers, f32 [n, D]."""
        if layers != self._layers:
            self._layers, self._ids, self._columns = layers, [], 0
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids)))
        start = min(shared, first)
        self._make_room(len(ids))
        self._ids = ids[:start]  # rows from here on are written anew; a stop in between leaves no wrong ones
        made = [self._pass(ids, lo, min(lo + _ROWS, len(ids))) for lo in range(start, len(ids), _ROWS)]
        self._ids = ids
        return torch.cat(made)[first - start :]

    def _pass(self, ids: list[int], lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) through the layers, f32 [n, D]; the K/V of all before them are there."""
        model, config, n = self._model, self._model.config, hi - lo
        tok = torch.arange(lo, hi)
        x = F.pad(model.embed(torch.tensor(ids[lo:hi])), (0, 0, 0, padded(n) - n))
        cos, sin = model.rope(F.pad(tok, (0, len(x) - n)))
        attended = torch.zeros(len(x), config.num_heads, config.head_dim, dtype=model.dtype)
        rows = AttnRows([0, n], tok, tok, [False])
        for layer in range(self._layers):
            self._check()
            q, k, v = model.qkv(layer, x, cos, sin)
            self._attend(layer, rows, hi, q[:n], k[:n], v[:n], attended[:n])
            model.finish(layer, x, attended)
        return x[:n]

    def _attend(self, layer: int, rows: AttnRows, length: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """The rows' K/V are written, then read with all before them: q, out [n, Hq, d], k, v [n, Hkv, d]."""
        model, heads = self._model, self._model.config.num_kv_heads
        table = self._table[layer]
        self._layout.write(table.T[rows.tok // BLOCK].long() * BLOCK + (rows.tok % BLOCK)[:, None], k, v)
        call = AttnCall(
            q=q,
            rows=rows,
            layout=self._layout,
            kv=[KVView(table[:, : -(-length // BLOCK)], [length] * heads)],
            out=out,
            scale=model.scale,
            model_window=model.windows[layer],
        )
        model.ops.attend(call, 0, len(q))

    def _make_room(self, tokens: int) -> None:
        """Blocks for so many tokens. Column by column, so that more of them leave the first ones where they are."""
        if tokens <= self._columns * BLOCK:
            return
        config, before = self._model.config, self._columns
        column, self._columns = self._layers * config.num_kv_heads, 2 * -(-tokens // BLOCK)
        layout = KVLayout(1 + self._columns * column, config.head_dim, self._model.dtype)
        if before:
            layout.k[: len(self._layout.k)] = self._layout.k
            layout.v[: len(self._layout.v)] = self._layout.v
        self._layout = layout
        blocks = 1 + torch.arange(self._columns * column).view(self._columns, self._layers, config.num_kv_heads)
        self._table = blocks.permute(1, 2, 0).contiguous().int()
