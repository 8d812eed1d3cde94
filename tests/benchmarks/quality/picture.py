"""The sparsity–fidelity frontier as an SVG: L0 against FVU and against ΔCE, one column per architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks.quality.cells import FRONTIER, Cell
from tests.benchmarks.svg import Axis, document, frame, level, line, text, upright

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
        parts.append(text(16, top + HEIGHT / 2, label, anchor="middle", turned=True))
        for column, (architecture, title) in enumerate(COLUMNS.items()):
            x_offset = LEFT + column * (WIDTH + GAP_X)
            x_axis = Axis(min(xs) / 1.1, max(xs) * 1.1, x_offset, x_offset + WIDTH)
            parts += _panel(x_axis, y_axis, first=column == 0, last=row == len(ROWS) - 1)
            if row == 0:
                parts.append(text(x_offset + WIDTH / 2, top - 10, title, anchor="middle", weight=600))
            for library, colour in reversed(COLOURS.items()):  # ours is drawn last, on top
                points = series.get((library, architecture, measure), [])
                parts += line([(x_axis.at(x), y_axis.at(y)) for x, y in points], colour)
    width = LEFT + len(COLUMNS) * (WIDTH + GAP_X)
    height = TOP + len(ROWS) * (HEIGHT + GAP_Y) - GAP_Y + BOTTOM
    middle = LEFT + (width - LEFT - GAP_X) / 2
    parts.append(text(middle, height - 10, "L0: mean number of active latents (held-out rows)", anchor="middle"))
    return document(width, height, parts)


def _legend(libraries: Iterable[str]) -> Iterable[str]:
    x = float(LEFT)
    for library in libraries:
        yield from line([(x, 22), (x + 24, 22)], COLOURS[library])
        yield text(x + 32, 26.5, LABELS[library])
        x += 60 + 7.2 * len(LABELS[library])


def _panel(x_axis: Axis, y_axis: Axis, first: bool, last: bool) -> Iterable[str]:
    """Frame, grid and the numbers along the outer edges."""
    for l0 in FRONTIER:
        if x_axis.low <= l0 <= x_axis.high:
            x = x_axis.at(l0)
            yield upright(x, y_axis)
            if last:
                yield text(x, y_axis.start + 17, f"{l0}", anchor="middle")
    for value in (tick * 10.0**power for power in range(-6, 3) for tick in TICKS):
        if y_axis.low <= value <= y_axis.high:
            y = y_axis.at(value)
            yield level(y, x_axis)
            if first:
                yield text(x_axis.start - 7, y + 4.5, f"{value:.3g}", anchor="end")
    yield frame(x_axis, y_axis)
