"""The sparsity–fidelity frontier as an SVG: L0 against FVU and against ΔCE, one column per architecture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.quality.cells import FRONTIER, Cell

COLOURS = {"ours": "#c2410c", "dictionary_learning": "#2563eb", "saelens": "#0f766e", "sparsify": "#7c3aed"}
LABELS = {
    "ours": "Sluice",
    "dictionary_learning": "dictionary_learning",
    "saelens": "SAELens",
    "sparsify": "sparsify",
}
COLUMNS = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
ROWS = {"fvu": "FVU", "ce_delta": "ΔCE (nats per token)"}
WIDTH, HEIGHT = 300, 230
"""Of one panel, in pixels."""
LEFT, TOP, GAP_X, GAP_Y, BOTTOM = 62, 66, 22, 34, 48
TICKS = (1, 1.5, 2, 3, 5, 7)
INK, FAINT, PAPER = "#1f2933", "#d8dee6", "#ffffff"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A logarithmic scale from `low` … `high` to `start` … `end` in pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def draw(results: Mapping[str, dict[str, Any]], best: Sequence[Cell]) -> str:
    """`best` are the contenders at the rate whose other L0 were trained; those without any are left out."""
    series = {
        (cell.library, cell.architecture, measure): sorted(
            (results[point.name]["l0"], results[point.name][measure])
            for point in (cell.but(k=k) for k in FRONTIER)
            if point.name in results and results[point.name][measure] > 0
        )
        for cell in best
        for measure in ROWS
    }
    xs = [x for points in series.values() for x, _ in points] or [8.0, 128.0]
    parts = list(_legend(library for library in COLOURS if any(key[0] == library and series[key] for key in series)))
    for row, (measure, label) in enumerate(ROWS.items()):
        ys = [y for key, points in series.items() if key[2] == measure for _, y in points] or [0.01, 1.0]
        top = TOP + row * (HEIGHT + GAP_Y)
        y_axis = Axis(min(ys) / 1.15, max(ys) * 1.15, top + HEIGHT, top)
        parts.append(_text(16, top + HEIGHT / 2, label, anchor="middle", turned=True))
        for column, (architecture, title) in enumerate(COLUMNS.items()):
            left = LEFT + column * (WIDTH + GAP_X)
            x_axis = Axis(min(xs) / 1.1, max(xs) * 1.1, left, left + WIDTH)
            parts += _panel(x_axis, y_axis, first=column == 0, last=row == len(ROWS) - 1)
            if row == 0:
                parts.append(_text(left + WIDTH / 2, top - 10, title, anchor="middle", weight=600))
            for library, colour in reversed(COLOURS.items()):  # ours is drawn last, on top
                points = series.get((library, architecture, measure), [])
                parts += _line([(x_axis.at(x), y_axis.at(y)) for x, y in points], colour)
    width = LEFT + len(COLUMNS) * (WIDTH + GAP_X)
    height = TOP + len(ROWS) * (HEIGHT + GAP_Y) - GAP_Y + BOTTOM
    middle = LEFT + (width - LEFT - GAP_X) / 2
    parts.append(_text(middle, height - 10, "L0: mean number of active latents (held-out rows)", anchor="middle"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        f'font-size="13">\n<rect width="{width}" height="{height}" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def _legend(libraries: Iterable[str]) -> Iterable[str]:
    x = float(LEFT)
    for library in libraries:
        yield from _line([(x, 22), (x + 24, 22)], COLOURS[library])
        yield _text(x + 32, 26.5, LABELS[library])
        x += 60 + 7.2 * len(LABELS[library])


def _panel(x_axis: Axis, y_axis: Axis, first: bool, last: bool) -> Iterable[str]:
    """Frame, grid and the numbers along the outer edges."""
    for l0 in FRONTIER:
        if x_axis.low <= l0 <= x_axis.high:
            x = x_axis.at(l0)
            yield f'<path d="M{x:.1f} {y_axis.start:.1f}V{y_axis.end:.1f}" stroke="{FAINT}"/>'
            if last:
                yield _text(x, y_axis.start + 17, f"{l0}", anchor="middle")
    for value in (tick * 10.0**power for power in range(-6, 3) for tick in TICKS):
        if y_axis.low <= value <= y_axis.high:
            y = y_axis.at(value)
            yield f'<path d="M{x_axis.start:.1f} {y:.1f}H{x_axis.end:.1f}" stroke="{FAINT}"/>'
            if first:
                yield _text(x_axis.start - 7, y + 4.5, f"{value:.3g}", anchor="end")
    yield (
        f'<rect x="{x_axis.start:.1f}" y="{y_axis.end:.1f}" width="{x_axis.end - x_axis.start:.1f}" '
        f'height="{y_axis.start - y_axis.end:.1f}" fill="none" stroke="{INK}" stroke-opacity="0.5"/>'
    )


def _line(points: Points, colour: str) -> Iterable[str]:
    if not points:
        return
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for x, y in points:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}" stroke="{PAPER}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: int = 400, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"{turn}>{text}</text>'
    )
