"""What a request's run really was: the part of `firstlight run --json` that the engine knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from firstlight.core.registry import Part
from firstlight.engine.live import LiveRequest


def report(live: LiveRequest, parts: Sequence[Part]) -> dict[str, Any]:
    """Times in seconds, cells of the prompt's grid, bytes of KV. The caller adds load, tokenising and text."""
    stamps, layers = live.stamps, len(live.f)
    queued = max(stamps.first_unit - stamps.arrived - stamps.reuse_s, 0.0)
    generated = live.num_generated
    decode_s = stamps.finished - stamps.first_token
    return {
        "exact": all(part.capability.exact for part in parts) or (live.fallback != "" and live.dense_from == 0),
        "prompt_tokens": live.num_prompt,
        "cached_tokens": live.n_cached,
        "completion_tokens": generated,
        "token_ids": live.ids[live.num_prompt :],
        "finish_reason": live.finish_reason,
        "ttft_s": stamps.first_token - stamps.arrived,
        "tpot_s": decode_s / (generated - 1) if generated > 1 else 0.0,
        "timings": {
            "queue_s": queued,
            "reuse_s": stamps.reuse_s,
            "prefill_s": stamps.prefilled - stamps.first_unit,
            "sample_s": stamps.first_token - stamps.prefilled,
        },
        "cells": _cells(live, layers),
        "attention": {"density": live.stats.visible / live.stats.dense if live.stats.dense else 1.0},
        "kv": {"bytes_peak": live.kv.peak_nbytes, "bytes_end": live.kv_end},
        "methods": [{"name": p.method, "seam": p.seam, "used": not live.fallback, "why": live.fallback} for p in parts],
        "cache_miss_reason": live.miss_reason,
        "num_preempted": live.num_preempted,
    }


def _cells(live: LiveRequest, layers: int) -> dict[str, int]:
    """The prompt's cells by state."""
    total, reused = live.num_prompt * layers, live.n_cached * layers + live.reused
    absent = max(total - reused - live.computed - live.parked_cells, 0)
    return {
        "computed": live.computed,
        "reused": reused,
        "parked": live.parked_cells,
        "absent": absent,
        "total": total,
    }
