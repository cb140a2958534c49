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
        "exact": _is_exact(live, parts),
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
        "methods": _methods(live, parts),
        "cache_miss_reason": live.miss_reason,
        "num_preempted": live.num_preempted,
    }


def _is_exact(live: LiveRequest, parts: Sequence[Part]) -> bool:
    """Of what the engine did. What an editor did to this prompt is told later; to a document, it may have long ago."""
    acting = [part for part in parts if part.seam != "prompt" or live.request.known is not None]
    return all(part.capability.exact for part in acting) or (live.fallback != "" and live.dense_from == 0)


def _methods(live: LiveRequest, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Each part, and what it notes of itself."""
    notes = {"tokens": iter([c.notes for c in live.contexts]), "cache": iter([live.retention_context.notes])}
    facts = {"used": not live.fallback, "why": live.fallback}
    if live.unplanned and not live.fallback:
        share = f"{live.unplanned} of {live.unplanned + live.planned}"
        why = f"dense in {share} layers of passes, where planning would not have paid"
        notes["attention"] = iter([{"used": live.planned > 0, "why": why}] * len(parts))
    return [{"name": p.method, "seam": p.seam} | facts | next(notes.get(p.seam, iter(())), {}) for p in parts]


def _cells(live: LiveRequest, layers: int) -> dict[str, Any]:
    """The prompt's cells by state, and the share of them that was computed in each layer."""
    total, reused, computed = live.num_prompt * layers, live.n_cached * layers + live.reused, sum(live.computed)
    absent = max(total - reused - computed - live.parked_cells, 0)
    return {
        "computed": computed,
        "reused": reused,
        "parked": live.parked_cells,
        "absent": absent,
        "total": total,
        "computed_by_layer": [round(count / live.num_prompt, 4) for count in live.computed],
    }
