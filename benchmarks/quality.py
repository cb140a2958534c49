"""Draws what `firstlight eval ... --json` printed: quality over time to first token, with the Pareto front.

    firstlight eval smollm2 --tasks niah_single_2 --method lazyllm --controls --json > eval.json
    python benchmarks/quality.py eval.json benchmarks/results

One SVG for each task, place and length in the file: a point for each setting, its interval as a line, dense's score
dashed. A line joins the front: the settings that no other one beats in both. What dense itself can't do isn't drawn,
and neither are figures that no request was timed for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from picture import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, _legend, _text, round_between

FRONT, BEATEN = COLOURS[True], "#888"
LESS = ("perplexity",)
"""Tasks whose score is better the smaller it is."""

Row = dict[str, Any]


class Plane(Axes):
    """Seconds across, logarithmic; scores up, linear."""

    label = "time to first token"

    def __init__(self, points: Sequence[tuple[float, float]], low: float, high: float) -> None:
        super().__init__([(seconds, 1.0) for seconds, _ in points])
        room = (high - low) * 0.08 or 0.05
        self.low, self.high = low - room, high + room

    def ticks_x(self, places: list[float]) -> list[float]:
        return round_between(math.log(places[0] / 1.2), math.log(places[-1] * 1.2))

    def text_x(self, place: float) -> str:
        return f"{place:g} s"

    def text_y(self, place: float) -> str:
        return f"{place:g}"

    def at(self, length: float, seconds: float) -> tuple[float, float]:
        x, _ = super().at(length, 1.0)
        share = (seconds - self.low) / (self.high - self.low)
        return x, round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def _ticks(self) -> list[float]:
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step = next(step * part for part in (0.2, 0.5, 1.0, 2.0) if (self.high - self.low) / (step * part) <= 8)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(number * step, 10) for number in range(first, last + 1)]


def main() -> None:
    source, folder = map(Path, sys.argv[1:3])
    found = json.loads(source.read_text("utf-8"))
    for (task, at, length), rows in cells(found["rows"]).items():
        target = folder / f"{Path(found['model']).stem}-{task}-{at}-{length}.svg"
        target.write_text(quality(found["model"], found["machine"], rows), "utf-8")
        print(target)


def cells(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """The rows of each picture: those that have a score and a time, of cells in which something beside dense has."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["score"] is not None and row["ttft_s"] is not None:
            found.setdefault((row["task"], row["at"], row["length"]), []).append(row)
    return {cell: group for cell, group in found.items() if len(group) > 1}


def front(rows: Sequence[Row]) -> list[bool]:
    """Which rows no other one beats: as quick and as good, and better in one of both."""
    points = [(row["ttft_s"], _worse(row)) for row in rows]
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def _worse(row: Row) -> float:
    return float(row["score"] if row["task"] in LESS else -row["score"])


def quality(model: str, machine: Row, rows: Sequence[Row]) -> str:
    """The SVG of one cell; the first row is dense's."""
    low = min(min(row["low"], row["score"]) for row in rows)
    high = max(max(row["high"], row["score"]) for row in rows)
    points = [(row["ttft_s"], row["score"]) for row in rows]
    axes, best = Plane(points, low, high), front(rows)
    parts = [*axes.draw(), *_title(model, machine, rows[0]), *_dense(axes, rows[0])]
    line = " ".join("{},{}".format(*axes.at(*point)) for point in sorted(p for p, good in zip(points, best) if good))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{FRONT}" stroke-width="1.5"/>')
    for number, (row, good) in enumerate(zip(rows, best), start=1):
        parts += _point(axes, row, number, FRONT if good else BEATEN)
        parts.append(_text(WIDTH - RIGHT + 12, TOP - 20 + 34 * number, f"{number}  {row['name']}", 11))
        parts.append(_text(WIDTH - RIGHT + 26, TOP - 6 + 34 * number, _figures(row), 10))
    parts += _legend(2 * len(rows), FRONT, "", "not beaten in both")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>", ""])


def _point(axes: Plane, row: Row, number: int, colour: str) -> list[str]:
    (x, y), (_, top), (_, bottom) = (axes.at(row["ttft_s"], row[key]) for key in ("score", "high", "low"))
    return [
        f'<path d="M{x} {top}V{bottom}" stroke="{colour}" stroke-width="1"/>',
        f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>',
        _text(x + 7, y - 6, f"{number}", 12),
    ]


def _dense(axes: Plane, dense: Row) -> list[str]:
    _, y = axes.at(dense["ttft_s"], dense["score"])
    return [f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#333" stroke-dasharray="1 4"/>']


def _title(model: str, machine: Row, row: Row) -> list[str]:
    what = f"{row['task']}, {row['at']}, {row['length']:,} tokens, n {row['samples']}: {Path(model).stem}"
    where = f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, commit {machine['commit']}"
    return [_text(LEFT, 26, what, 17), _text(LEFT, 44, where, 12)]


def _figures(row: Row) -> str:
    return (
        f"{row['score']:.3g} [{row['low']:.3g}, {row['high']:.3g}], {row['ttft_s']:.2f} s, density {row['density']:.2f}"
    )


if __name__ == "__main__":
    main()
