"""Where the time to the first token went, as a small table for a person."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from firstlight.core.config import INT8_PARTS, format_bytes, int8_parts

STATIONS = {
    "load_s": "weights to memory",
    "tokenize_s": "text to tokens",
    "edit_s": "shortening the prompt",
    "queue_s": "waiting for a turn",
    "reuse_s": "looking for known cells",
    "prefill_s": "computing cells",
    "sample_s": "picking the token",
}


def breakdown(report: dict[str, Any]) -> Table:
    """The table of one report (`Completion.report`)."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for key, what in STATIONS.items():
        seconds = report["timings"].get(key, 0.0)
        if key == "edit_s" and not seconds:
            continue
        note = f"{what}, before the clock starts" if key == "load_s" else f"{what}{_prefill_note(report, key)}"
        table.add_row(key.removesuffix("_s"), duration(seconds), note)
    table.add_row("[bold]first token", f"[bold]{duration(report['ttft_s'])}", summary(report))
    if report["tpot_s"]:
        table.add_row("per token", duration(report["tpot_s"]), f"{1 / report['tpot_s']:.1f} tokens/s after the first")
    return table


def summary(report: dict[str, Any]) -> str:
    """One line: the prompt, what was reused, whether the answer is exact, and the methods that were not used."""
    kind = "; ".join(["exact", *_shown(report)]) if report["exact"] else f"approximate: {approximations(report)}"
    kv = format_bytes(report["kv"]["bytes_peak"])
    return f"{report['prompt_tokens']} prompt tokens, {report['cached_tokens']} from the cache, KV {kv}; {kind}"


def approximations(report: dict[str, Any]) -> str:
    """What made a run approximate: its precision, its methods, and why one was not used."""
    int8 = int8_parts(report["settings"]["precision"])
    low = [f"int8 {part}" for part in INT8_PARTS if part in int8]
    return ", ".join([*low, *_shown(report)]) + f"; {report['attention']['density']:.0%} of dense attention"


def _shown(report: dict[str, Any]) -> list[str]:
    """Each method once, with what it did."""
    return list({m["name"]: f"{m['name']}{_did(m)}" for m in report["methods"]}.values())


def _did(method: dict[str, Any]) -> str:
    """What is worth saying of a method besides its name."""
    if not method["used"]:
        return f" (not used: {method['why']})"
    return f" (kept {method['kept']:,} of {method['origin']:,} tokens)" if "origin" in method else ""


def duration(seconds: float | None) -> str:
    """Seconds for people: `1.234 s` or `12.3 ms`."""
    if seconds is None:
        return "-"
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _prefill_note(report: dict[str, Any], key: str) -> str:
    computed = report["prompt_tokens"] - report["cached_tokens"]
    seconds = report["timings"]["prefill_s"]
    return f", {computed / seconds:,.0f} tokens/s" if key == "prefill_s" and seconds > 0 else ""
