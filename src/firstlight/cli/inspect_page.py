"""The page of `firstlight inspect`: the words, here; the pictures are drawn by inspect.html from the same data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from firstlight.cli.breakdown import STATIONS, duration
from firstlight.core.config import format_bytes
from firstlight.core.files import shipped

Found = Mapping[str, Any]
"""What `evaluate/inspection.py` gives."""
_STATES = ("computed", "reused", "parked", "absent")


def page(found: Found, documents: Sequence[str] = ()) -> str:
    """The HTML, complete in itself."""
    report = found["report"]
    shown = {
        "title": escape(f"{_name(found)}: {report['prompt_tokens']:,} tokens"),
        "heading": escape(f"{_name(found)} reads {report['prompt_tokens']:,} tokens"),
        "subheading": escape(_where(found, documents)),
        "tiles": "".join(
            f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in _tiles(found)
        ),
        "heads_note": escape(_heads_note(found)),
        "time_note": escape(_time_note(found)),
        "cells_note": escape(_cells_note(report["cells"])),
        "sampled": "4" if found["grid"]["cell"] >= 4 else "all",
        "report": "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _lines(found)),
        "report_json": escape(json.dumps(report, ensure_ascii=False, indent=2)),
        "data": json.dumps({key: value for key, value in found.items() if key != "report"}).replace("<", "\\u003c"),
    }
    template = shipped("cli/inspect.html")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: shown[name[1]], template)


def _name(found: Found) -> str:
    return Path(found["model"]).name


def _where(found: Found, documents: Iterable[str]) -> str:
    """The prompt, the setting and the machine in a line."""
    settings, machine = found["report"]["settings"], found["machine"]
    methods = [str(m) if isinstance(m, str) else _method(m) for m in settings["method"]]
    parts = [
        ", ".join(Path(name).name for name in documents),
        f"{settings['precision']}, {' '.join(methods) or 'no method: dense'}",
        f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}",
    ]
    return " · ".join(part for part in parts if part)


def _method(method: Mapping[str, Any]) -> str:
    """A method as `--method` takes it."""
    settings = ",".join(f"{key}={value}" for key, value in method["settings"].items())
    return f"{method['name']}:{settings}" if settings else method["name"]


def _tiles(found: Found) -> Iterator[tuple[str, str]]:
    report, cells = found["report"], found["report"]["cells"]
    yield duration(report["ttft_s"]), "to the first token"
    yield f"{report['attention']['density']:.1%}", "of dense attention read"
    yield f"{_mean(found['kept']):.1%}", "of attention kept"
    yield f"{cells['computed'] / cells['total']:.1%}", "of cells computed"
    yield format_bytes(report["kv"]["bytes_peak"]), "of KV at most"


def _mean(rows: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, rows)) / max(sum(map(len, rows)), 1)


def _heads_note(found: Found) -> str:
    least = min((value, layer, h) for layer, row in enumerate(found["kept"]) for h, value in enumerate(row))
    kept = f"The head that keeps least is {least[2]} of layer {least[1]}, with {least[0]:.0%}."
    text = (
        "Density: the share of the causal triangle that a head's rows read. Attention kept: how much of what dense "
        "attention would give lies on what is read. "
    )
    windows = sum(window is not None for window in found["windows"])
    if windows:
        text += f"{windows} of {len(found['windows'])} layers have a window of the model's own. "
    return text + (kept if least[0] < 1 else "Here every head keeps all of it.")


def _time_note(found: Found) -> str:
    sums = [sum(column) for column in zip(*found["seconds"])]
    whole, prefill = sum(sums), found["report"]["timings"]["prefill_s"]
    shares = ", ".join(f"{work} {duration(s)} ({s / whole:.0%})" for work, s in zip(found["work"], sums))
    return (
        f"{shares}. Outside of the layers (embedding, head): {duration(max(prefill - whole, 0.0))}. "
        f"Looking took {duration(found['watched_s'])}, which is in no figure here."
    )


def _cells_note(cells: Mapping[str, Any]) -> str:
    return ", ".join(f"{cells[state] / cells['total']:.1%} {state}" for state in _STATES if cells[state]) + "."


def _lines(found: Found) -> Iterator[tuple[str, str]]:
    """The request's report in words."""
    report, cells = found["report"], found["report"]["cells"]
    yield "Answer", "exact" if report["exact"] else "approximate"
    for method in report["methods"]:
        yield f"{method['name']} ({method['seam']})", _method_did(method)
    if not report["methods"]:
        yield "Methods", "none: every row reads everything before it"
    prompt = f"{report['prompt_tokens']:,} tokens"
    yield "Prompt", f"{prompt}, {report['cached_tokens']:,} of them from the prefix cache"
    stations = [(key, report["timings"].get(key, 0.0)) for key in STATIONS if key != "load_s"]
    spent = ", ".join(f"{STATIONS[key]} {duration(seconds)}" for key, seconds in stations if seconds)
    yield "First token", f"after {duration(report['ttft_s'])}: {spent}"
    yield "Cells", ", ".join(f"{cells[state]:,} {state}" for state in _STATES) + f", of {cells['total']:,}"
    kv = report["kv"]
    yield "KV", f"{format_bytes(kv['bytes_peak'])} at most, {format_bytes(kv['bytes_end'])} at the end"
    yield "It began", repr(report["text"])


def _method_did(method: Mapping[str, Any]) -> str:
    """Whether a method was used, what it says of itself, and why not or not everywhere."""
    notes = {k: v for k, v in method.items() if k not in ("name", "seam", "used", "why")}
    said = ", ".join(
        f"{key.replace('_', ' ')}: {value}" for key, value in notes.items() if not isinstance(value, dict | list)
    )
    parts = ["used" if method["used"] else "not used", method["why"], said]
    return "; ".join(part for part in parts if part)
