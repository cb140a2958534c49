"""Draws the rows of `firstlight bench ttft --against ... --results FILE`: time to first token over prompt length.

    python benchmarks/picture.py benchmarks/results/ttft.jsonl benchmarks/results

One SVG for each model in the file: every engine at its best setting, from the latest run that measured it at a length;
exact rows in blue, quantised ones in orange in a panel of their own, and in each the machine's measured limit as a
dashed line. Both axes are logarithmic. An engine without a figure is named below the picture with its reason.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 60, 60
COLOURS = {True: "#1f5fbf", False: "#d9730d"}
KINDS = {True: "exact", False: "quantised"}
PLOT, PANEL = 330, 500
"""Pixels of a panel's axes, and from one panel to the next: names of engines stand between."""
OURS = "firstlight"
DASHES = {OURS: "", "openvino": "8 3", "transformers": "2 3", "vllm": "8 3 2 3", "llama.cpp": "14 4"}

Point = tuple[int, float]


def main() -> None:
    source, folder = map(Path, sys.argv[1:3])
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    for model in dict.fromkeys(row["model"] for row in rows):
        target = folder / f"{model}.svg"
        target.write_text(picture(model, [row for row in rows if row["model"] == model]), "utf-8")
        print(target)


def picture(model: str, rows: Sequence[dict[str, Any]]) -> str:
    """The SVG of one model: a panel of exact rows, and beside it one of quantised rows on the same scale."""
    machine = rows[-1]["machine"]
    rows = [row for row in rows if _place(row) == _place(rows[-1])]
    best, limits = best_of(rows), limits_of(rows)
    if not best:
        raise SystemExit(f"{model}: no engine was measured, so there is nothing to draw")
    points = [point for points in [*best.values(), *limits.values()] for point in points]
    kinds = [exact for exact in KINDS if exact in limits]
    parts = _title(model, machine)
    for number, exact in enumerate(kinds):
        axes = Axes(points, LEFT + number * PANEL, LEFT + number * PANEL + PLOT)
        lines = {engine: points for (engine, kind), points in best.items() if kind is exact}
        parts += [*axes.draw(), *_panel(axes, exact, lines, limits[exact])]
    reasons = _missing(rows, best)
    parts += [_text(LEFT, HEIGHT + 14 * number, reason, 10) for number, reason in enumerate(reasons)]
    width, height = LEFT + len(kinds) * PANEL, HEIGHT + 14 * len(reasons)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def _panel(axes: Axes, exact: bool, lines: Mapping[str, Sequence[Point]], limit: Sequence[Point]) -> list[str]:
    """One kind's engines, ours the thickest, and the limit. The names stand at the lines' ends, none on another."""
    colour = COLOURS[exact]
    parts = [_text(axes.left + 10, TOP + 4, KINDS[exact], 15, colour=colour)]
    parts += _line(axes, limit, "#333", "6 4", 1.2)
    for engine, points in lines.items():
        parts += _line(axes, points, colour, DASHES.get(engine, "4 6"), 3.2 if engine == OURS else 1.8, dots=True)
    names = {**lines, "limit": limit}
    ends = {name: axes.at(*points[-1])[1] for name, points in names.items()}
    for name, y in apart(ends, 15).items():
        x, shade = axes.right, "#333" if name == "limit" else colour
        parts.append(f'<path d="M{axes.at(*names[name][-1])[0] + 5} {ends[name]}L{x + 4} {y}" stroke="#bbb"/>')
        said = f"{name} {names[name][-1][1]:.3g} s"
        parts.append(_text(x + 7, y + 4, said, 12, colour=shade, bold=name == OURS))
    return parts


def apart(places: Mapping[str, float], least: float) -> dict[str, float]:
    """The same places in the same order, moved upward as little as makes them stand `least` apart."""
    moved: dict[str, float] = {}
    above = math.inf
    for name in sorted(places, key=places.__getitem__, reverse=True):
        above = moved[name] = min(places[name], above - least)
    return moved


def best_of(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, bool], list[Point]]:
    """(prompt tokens, seconds) of each engine and kind: its fastest setting in the latest run at each length."""
    latest: dict[tuple[str, bool, int], tuple[str, float]] = {}
    for row in rows:
        if "ttft_s" in row:
            key, seconds = (row["engine"], row["exact"], row["prompt_tokens"]), row["ttft_s"]["median"]
            known = latest.get(key)
            if known is None or row["date"] > known[0] or (row["date"] == known[0] and seconds < known[1]):
                latest[key] = row["date"], seconds
    found: dict[tuple[str, bool], list[Point]] = {}
    for (engine, exact, length), (_, seconds) in sorted(latest.items(), key=lambda item: (not item[0][1], item[0])):
        found.setdefault((engine, exact), []).append((length, seconds))
    return found


def limits_of(rows: Iterable[dict[str, Any]]) -> dict[bool, list[Point]]:
    """The least seconds at each length, of each kind; float32 has a limit of its own and is left out."""
    limits: dict[bool, dict[int, float]] = {}
    for row in rows:
        if "ttft_s" in row and row["settings"].get("precision") != "f32":
            limits.setdefault(row["exact"], {})[row["prompt_tokens"]] = row["limit_s"]
    return {exact: sorted(points.items()) for exact, points in sorted(limits.items(), reverse=True)}


class Axes:
    """Logarithmic axes that hold some points; ticks stand at the x that occur."""

    label = "prompt tokens"

    def __init__(self, points: Sequence[tuple[float, float]], left: float = LEFT, right: float = WIDTH - RIGHT) -> None:
        self.left, self.right = left, right
        lengths, seconds = [x for x, _ in points], [y for _, y in points]
        self.lengths = self.ticks_x(sorted(set(lengths)))
        self.x0, self.x1 = math.log(min(lengths) / 1.2), math.log(max(lengths) * 1.2)
        self.y0, self.y1 = math.log(min(seconds) / 1.3), math.log(max(seconds) * 1.3)

    def ticks_x(self, places: list[float]) -> list[float]:
        return places

    def text_x(self, place: float) -> str:
        return f"{place:,}"

    def text_y(self, place: float) -> str:
        return f"{place:g} s"

    def at(self, length: float, seconds: float) -> tuple[float, float]:
        """Pixels of a point."""
        x = self.left + (math.log(length) - self.x0) / (self.x1 - self.x0) * (self.right - self.left)
        y = HEIGHT - BOTTOM - (math.log(seconds) - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    def draw(self) -> list[str]:
        bottom, left, right = HEIGHT - BOTTOM, self.left, self.right
        parts = [f'<path d="M{left} {TOP}V{bottom}H{right}" fill="none" stroke="#333"/>']
        for seconds in self._ticks():
            y = self.at(1, seconds)[1]
            parts.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>')
            parts.append(_text(left - 6, y + 4, self.text_y(seconds), 12, "end"))
        for length in self.lengths:
            x = self.at(length, 1)[0]
            parts.append(f'<path d="M{x} {bottom}v5" stroke="#333"/>')
            parts.append(_text(x, bottom + 20, self.text_x(length), 12, "middle"))
        parts.append(_text((left + right) / 2, bottom + 42, self.label, 13, "middle"))
        return parts

    def _ticks(self) -> list[float]:
        return round_between(self.y0, self.y1)


def round_between(low: float, high: float) -> list[float]:
    """1, 2, 5 of every power of ten whose logarithm is in a range."""
    powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    ticks = (digit * 10.0**power for power in powers for digit in (1, 2, 5))
    return [tick for tick in ticks if low <= math.log(tick) <= high]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["machine"]["cpu"], row["machine"]["isa"], row["machine"]["threads"]


def _missing(rows: Sequence[dict[str, Any]], best: dict[tuple[str, bool], list[Point]]) -> list[str]:
    reasons = {(r["engine"], r["exact"]): r["failed"] for r in rows if "ttft_s" not in r}
    return [f"no {KINDS[key[1]]} figure of {key[0]}: {why}" for key, why in reasons.items() if key not in best]


def _title(model: str, machine: dict[str, Any]) -> list[str]:
    where = f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, commit {machine['commit']}"
    return [_text(LEFT, 26, f"Time to first token: {model}", 17), _text(LEFT, 44, where, 12)]


def _line(axes: Axes, points: Sequence[Point], colour: str, dashes: str, width: float, dots: bool = False) -> list[str]:
    places = [axes.at(*point) for point in points]
    path = " ".join(f"{x},{y}" for x, y in places)
    style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"'
    circles = [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in places if dots]
    return [f'<polyline points="{path}" {style}/>', *circles]


def _legend(number: int, colour: str, dashes: str, text: str) -> list[str]:
    x, y = WIDTH - RIGHT + 16, TOP + 12 + 20 * number
    line = f'<path d="M{x} {y}h28" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    return [line, _text(x + 34, y + 4, text, 11)]


def _text(
    x: float, y: float, text: str, size: int, anchor: str = "start", colour: str = "black", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}'
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'


if __name__ == "__main__":
    main()
