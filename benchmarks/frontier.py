"""Draws the rows of `firstlight bench itl --results FILE`: time to first token over p99 inter-token latency.

    python benchmarks/frontier.py benchmarks/results/itl.jsonl benchmarks/results

One SVG for each model in the file, of the latest row of each schedule on the machine of the last row. A line joins the
Pareto front: the schedules that no other one beats in both. Dashed lines: the prompt alone, and the streams alone. What
urgent requests wait beyond their own time is in the legend. Both axes are logarithmic.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picture import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, _legend, _place, _text, round_between

from firstlight.evaluate.itl import front

FRONT, BEATEN = COLOURS[True], "#888"


class Plane(Axes):
    """Milliseconds across, seconds up."""

    label = "p99 inter-token latency beside the prefill"

    def ticks_x(self, places: list[float]) -> list[float]:
        return round_between(math.log(places[0] / 1.2), math.log(places[-1] * 1.2))

    def text_x(self, place: float) -> str:
        return f"{place:g} ms"


def main() -> None:
    source, folder = map(Path, sys.argv[1:3])
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    for model in dict.fromkeys(row["model"] for row in rows):
        target = folder / f"{model}-itl.svg"
        target.write_text(frontier(model, [row for row in rows if row["model"] == model]), "utf-8")
        print(target)


def frontier(model: str, rows: Sequence[dict[str, Any]]) -> str:
    """The SVG of one model."""
    like = rows[-1]
    rows = latest([row for row in rows if _scene(row) == _scene(like)])
    alone_ms = min(1000 * row["itl_alone_s"]["p50"] for row in rows)
    alone_s = min(row["ttft_alone_s"] for row in rows)
    points = [(1000 * row["itl_s"]["p99"], row["ttft_s"]["median"]) for row in rows]
    best = front(rows)
    axes = Plane([*points, (alone_ms, alone_s)])
    parts = [*axes.draw(), *_title(model, like), *_bounds(axes, alone_ms, alone_s)]
    line = " ".join("{},{}".format(*axes.at(*point)) for point in sorted(p for p, good in zip(points, best) if good))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{FRONT}" stroke-width="1.5"/>')
    for number, (row, point, good) in enumerate(zip(rows, points, best)):
        (x, y), colour = axes.at(*point), FRONT if good else BEATEN
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>')
        parts.append(_text(x + 7, y - 6, f"{number + 1}", 12))
        parts.append(_text(WIDTH - RIGHT + 12, TOP + 14 + 34 * number, f"{number + 1}  {row['schedule']}", 11))
        parts.append(_text(WIDTH - RIGHT + 26, TOP + 28 + 34 * number, _figures(row, point), 10))
    parts += _legend(2 * len(rows), FRONT, "", "not beaten in both")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>", ""])


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each schedule."""
    return list({row["schedule"]: row for row in rows}.values())


def _scene(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of one picture are of one machine and one scene."""
    return *_place(row), *(row[key] for key in ("streams", "stream_tokens", "prompt_tokens", "exact"))


def _title(model: str, row: dict[str, Any]) -> list[str]:
    machine = row["machine"]
    what = f"{row['prompt_tokens']:,} tokens arrive beside {row['streams']} streams: {model}"
    where = f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, commit {machine['commit']}"
    return [_text(LEFT, 26, f"Time to first token when {what}", 17), _text(LEFT, 44, where, 12)]


def _bounds(axes: Plane, alone_ms: float, alone_s: float) -> list[str]:
    """What nothing can beat: the prompt without streams, streams without a prompt."""
    x, y = axes.at(alone_ms, alone_s)
    dashed = 'stroke="#333" stroke-dasharray="1 4"/>'
    return [
        f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" {dashed}',
        f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" {dashed}',
        _text(WIDTH - RIGHT - 4, y + 14, "the prompt alone", 10, "end"),
        _text(x + 4, TOP + 10, "the streams alone (p50)", 10),
    ]


def _figures(row: dict[str, Any], point: tuple[float, float]) -> str:
    urgent = row["urgent"]
    late = f", urgent +{1000 * urgent['over_s']['p95']:.0f} ms (p95)" if urgent else ""
    return f"{point[1]:.2f} s, {point[0]:.0f} ms{late}"


if __name__ == "__main__":
    main()
