"""Logarithmic line charts as SVG, from strings: what the pictures of the benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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


def document(width: float, height: float, parts: Iterable[str]) -> str:
    """The whole file."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        f'font-size="13">\n<rect width="{width}" height="{height}" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def frame(x_axis: Axis, y_axis: Axis) -> str:
    return (
        f'<rect x="{x_axis.start:.1f}" y="{y_axis.end:.1f}" width="{x_axis.end - x_axis.start:.1f}" '
        f'height="{y_axis.start - y_axis.end:.1f}" fill="none" stroke="{INK}" stroke-opacity="0.5"/>'
    )


def upright(x: float, y_axis: Axis) -> str:
    """A line of the grid."""
    return f'<path d="M{x:.1f} {y_axis.start:.1f}V{y_axis.end:.1f}" stroke="{FAINT}"/>'


def level(y: float, x_axis: Axis) -> str:
    """A line of the grid."""
    return f'<path d="M{x_axis.start:.1f} {y:.1f}H{x_axis.end:.1f}" stroke="{FAINT}"/>'


def line(points: Points, colour: str) -> Iterable[str]:
    if not points:
        return
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for x, y in points:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}" stroke="{PAPER}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", weight: int = 400, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"{turn}>{words}</text>'
    )
