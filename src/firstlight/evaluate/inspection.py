"""One real prefill, taken apart: what `firstlight inspect` shows, as one JSON value.

Pictures are bytes, packed (zlib, base64): a cell of the plan is its kind times 64 plus the share of its pairs that is
read (0 to 63), a cell of attention the square root of its mass (0 to 255), a cell of the prompt its state's shares.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import torch
from torch import Tensor

from firstlight.core.request import SamplingParams
from firstlight.evaluate.machine import describe_processor
from firstlight.evaluate.sight import KINDS
from firstlight.evaluate.watch import PARKED, WORK, Record, Watch
from firstlight.llm import LLM

_DRAWN = 1 << 22
"""Cells of heads' pictures in a page; layers are left out evenly to keep to it."""
_SHARE = 63
_BYTE = 255


def inspect(llm: LLM, prompt: Any) -> dict[str, Any]:
    """Prefill a prompt (as `LLM.stream` takes it) up to its first token, and what was seen. Shapes as in `Record`.

    Times are those of the run less what looking took (`watched_s`).
    """
    watch = Watch(llm.engine)
    with watch.on():
        *_, last = llm.stream(prompt, SamplingParams(max_tokens=1, temperature=0.0))
    assert last.completion is not None and watch.live is not None
    record, config, stats = watch.record, llm.config, watch.live.stats
    pairs = record.pairs.sum((1, 3, 4))
    layers = _drawn_layers(record)
    return {
        "model": llm.model_name,
        "machine": describe_processor() | {"threads": torch.get_num_threads()},
        "report": _unwatched(last.completion.report, watch.paused_s),
        "watched_s": watch.paused_s,
        "shape": {"layers": config.num_layers, "heads": config.num_heads, "kv_heads": config.num_kv_heads},
        "windows": list(llm.engine.machine.model.windows),
        "density": _rounded(pairs * pairs.numel() / stats.dense) if stats.dense else [],
        "kept": _rounded(record.kept / record.sampled.sum(1, keepdim=True).clamp(min=1)),
        "work": WORK,
        "seconds": _rounded(record.seconds, 6),
        "grid": {"tokens": record.tokens, "cell": record.cell, "num": record.num},
        "cells": _packed(_states(record)),
        "kinds": KINDS,
        "drawn": layers,
        "plan": _packed(_plan(record)[layers]),
        "attention": _packed(_attention(record)[layers]),
    }


def _unwatched(report: dict[str, Any], watched_s: float) -> dict[str, Any]:
    """The report of the run without the watching, all of which fell into the prefill."""
    timings = report["timings"]
    less = {"prefill_s": timings["prefill_s"] - watched_s}
    return report | {"ttft_s": report["ttft_s"] - watched_s, "timings": timings | less}


def _drawn_layers(record: Record) -> list[int]:
    layers = len(record.kept)
    return list(range(0, layers, -(-record.mass.numel() // _DRAWN)))


def _states(record: Record) -> Tensor:
    """u8 [L, 3, C]: of each band of tokens the shares reused, computed, parked; the rest is absent."""
    band = torch.arange(record.tokens) // record.cell
    counts = torch.stack(
        [
            torch.zeros(len(record.cells), record.num).index_add_(1, band, (record.cells == state).float())
            for state in range(1, PARKED + 1)
        ]
    )
    return (counts / torch.bincount(band) * _BYTE).round().to(torch.uint8).transpose(0, 1)


def _plan(record: Record) -> Tensor:
    """u8 [L, H, C, C]: kind and share."""
    edges = torch.arange(record.num + 1).mul(record.cell).clamp(max=record.tokens)
    upto = [torch.arange(record.tokens)[:, None] + 1, edges]
    reach = torch.minimum(*upto)
    causal = torch.zeros(record.num, record.num, dtype=torch.int64)
    causal.index_add_(0, torch.arange(record.tokens) // record.cell, reach.diff())
    share = record.pairs.sum(1) / causal.clamp(min=1)
    level = (share * _SHARE).round().clamp(min=1, max=_SHARE) * (share > 0)
    return (record.pairs.argmax(1) * (_SHARE + 1) * (share > 0) + level).to(torch.uint8)


def _attention(record: Record) -> Tensor:
    """u8 [L, H, C, C]: square roots of a row's mean mass."""
    mean = record.mass / record.sampled[:, None, :, None].clamp(min=1)
    return (mean.clamp(0, 1).sqrt() * _BYTE).round().to(torch.uint8)


def _packed(values: Tensor) -> str:
    return base64.b64encode(zlib.compress(values.contiguous().numpy().tobytes(), 9)).decode("ascii")


def _rounded(values: Tensor, digits: int = 4) -> list[list[float]]:
    return [[round(value, digits) for value in row] for row in values.tolist()]
