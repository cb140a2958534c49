"""What linears read, measured once for each model: how the work of an int8 product is divided between its operands.

The model runs in bfloat16 over some made-up tokens; of every linear's input the mean square of each channel is kept,
and of every layer the mean of its keys, on disk beside the packed weights. No text is needed: which channels are
large is the model's habit, not the prompt's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from firstlight.core.files import cache_dir, write_atomically
from firstlight.models.decoder import Decoder

log = logging.getLogger(__name__)
_TOKENS = 256
_LAYOUT = 2
"""Raise it when the meaning of the stored numbers changes."""


def remembered(digest: str) -> dict[str, Tensor] | None:
    """What was measured on the model of this digest, if it is there."""
    with contextlib.suppress(OSError, SafetensorError):
        return load_file(_path(digest))
    return None


def remember(digest: str, spread: Mapping[str, Tensor]) -> None:
    """Keep it for the next start; where that can't be, say so."""
    try:
        with write_atomically(_path(digest)) as partial:
            save_file(dict(spread), partial)
    except OSError as error:
        log.warning("what int8 linears read is measured anew at every start (%s)", error)


def measure(model: Decoder) -> dict[str, Tensor]:
    """Name of a linear -> mean square of each channel of its input, f32 [I]; every row counts the same.

    `<layer>.keys` -> the mean of keys f32 [Hkv, d]: what all of them share, which int8 KV does without.
    """
    watched = _Watched(model.linears)
    model.linears = watched
    ids = torch.randint(model.config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    for layer, (_, k, _) in enumerate(layers_of(model, ids)):
        watched.seen[f"{layer}.keys"] = k.float().mean(0)
    model.linears = watched.linears
    return watched.seen


def layers_of(model: Decoder, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of a prompt i64 [n], layer by layer: queries [n, Hq, d], keys and values [n, Hkv, d]; rotated. Keeps no KV."""
    x = model.embed(ids)
    cos, sin = model.rope(torch.arange(len(ids)))
    for layer in range(model.config.num_layers):
        q, k, v = model.qkv(layer, x, cos, sin)
        yield q, k, v
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        mask = _band(len(ids), model.windows[layer])
        attended = scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, scale=model.scale, enable_gqa=True)
        model.finish(layer, x, attended[0].transpose(0, 1))


def _band(n: int, window: int | None) -> Tensor | None:
    """bool [n, n]: what rows of a window layer read; None where that is all before them."""
    if window is None or window >= n:
        return None
    return torch.ones(n, n, dtype=torch.bool).tril_().triu_(1 - window)


class _Watched:
    """Linears that note what they are given."""

    def __init__(self, linears: Any) -> None:
        self.linears = linears
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        square = x.float().square()
        self.seen[name] = (square / square.mean(-1, keepdim=True).clamp_min(1e-20)).mean(0)
        made: Tensor = self.linears(name, x, out)
        return made

    def scaled(self, name: str, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, None]:
        return self(name, x, out), None

    def head_rows(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.linears.head_rows(ids)
        return rows

    def reads(self, name: str) -> None:
        return None


def _path(digest: str) -> Path:
    return cache_dir() / "spread" / f"{digest[:16]}-{_LAYOUT}.safetensors"
