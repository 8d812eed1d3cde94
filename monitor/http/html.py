"""HTML out of records: templates that escape everything, and the filters with which they write numbers and tokens.

An unknown number is written as a dash, never as zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from math import log10
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from monitor.evaluation.latents.views import Histogram, LatentTable, Scatter
from producer.common.formatting import format_bytes, format_count

HERE = Path(__file__).parent
STATIC = HERE / "static"
DASH = "–"


def render(template: str, **data: Any) -> str:
    return _environment().get_template(template).render(data)


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        *(number, percentage, moment, format_bytes, format_count, visible, shaded, density_share, histogram_bars),
        *(criteria, scatter_picture),
    )
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals |= {
        "latent_address": latent_address,
        "query": lambda **values: "/?" + urlencode(values),
        "stylesheet": Markup((STATIC / "style.css").read_text("utf-8")),
    }
    return environment


def latent_address(sae: str, index: int) -> str:
    return f"/latents/{quote(sae)}/{index}"


# --- Numbers ---------------------------------------------------------------------------------------------------------


def number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else DASH


def percentage(value: Any) -> str:
    """Two significant digits: 0.00042 is 0.042 %."""
    if not isinstance(value, int | float):
        return DASH
    return "0 %" if value == 0 else f"{100 * value:.2g} %" if value < 0.0995 else f"{100 * value:.0f} %"


def moment(time: str | float) -> str:
    """A time as 2026-11-28 05:33 UTC, from seconds since the Unix epoch or from ISO 8601; other text stays."""
    try:
        parsed = datetime.fromisoformat(time) if isinstance(time, str) else datetime.fromtimestamp(time, UTC)
    except (ValueError, OverflowError, OSError):
        return str(time)
    return f"{parsed.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def criteria(table: LatentTable) -> str:
    """What an empty table was asked for: `fires most strongly in “x” with a density of 0.1:1`."""
    search = f"fires most strongly in “{table.search}”" if table.search else ""
    density = f"has a density from {table.density.replace(':', ' to ')}" if table.density else ""
    return " and ".join(filter(None, (search, density)))


def density_share(density: float) -> float:
    """The filled share of a density's meter, over five decades: 0 for 10⁻⁵ and less, 1 for every token."""
    return min(1.0, max(0.0, 1 + log10(density) / 5)) if density else 0.0


# --- Tokens ----------------------------------------------------------------------------------------------------------


def visible(text: str) -> Markup:
    """The text of a token on one line: line ends become marks, and three and more spaces become two."""
    text = re.sub(r"[^\S\n]{3,}", "  ", text.replace("\r", "").replace("\t", "  "))
    return escape(text).replace("\n", Markup('<i class="nl">↵</i>'))


def shaded(tokens: Sequence[str], values: Sequence[float], strongest: float, at: int | None = None) -> Markup:
    """Tokens on backgrounds as deep as the activation is strong; negative ones in another colour.

    The token of index `at` is underlined.
    """
    return Markup("").join(
        _shaded_token(visible(token), value, strongest, place == at)
        for place, (token, value) in enumerate(zip(tokens, values, strict=True))
    )


def _shaded_token(token: Markup, value: float, strongest: float, is_at: bool) -> Markup:
    if not value and not is_at:
        return token
    classes = "t" + (" at" if is_at else "") + (" neg" if value < 0 else "")
    depth = min(1.0, abs(value / strongest)) if strongest else 0.0
    return Markup('<span class="{}" style="--a:{:.2f}" title="{:.3g}">{}</span>').format(classes, depth, value, token)


# --- Histograms ------------------------------------------------------------------------------------------------------

SCATTER_HEIGHT = 136
WIDTH, HEIGHT = 360, 120
"""Size of the picture of a histogram."""


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, in the units of the picture, and the bin that it stands for."""

    x: float
    width: float
    height: float
    count: int
    low: float
    high: float


def histogram_bars(histogram: Histogram) -> list[Bar]:
    """Bars for all bins that are not empty; heights are logarithmic, since most activations are weak."""
    highest, step = max(histogram.counts, default=1), WIDTH / max(1, len(histogram.counts))
    return [
        Bar(
            x=index * step,
            width=step - 1,
            height=(HEIGHT - 4) * _log_share(count, highest),
            count=count,
            low=histogram.edges[index],
            high=histogram.edges[index + 1],
        )
        for index, count in enumerate(histogram.counts)
        if count
    ]


@dataclass(frozen=True)
class ScatterPicture:
    """A scatter in the units of the picture; `path` has a dot for each latent."""

    path: str
    own: tuple[float, float] | None
    """None for a silent latent."""
    word: str
    low_density: float
    high_density: float
    low: float
    high: float


def scatter_picture(scatter: Scatter) -> ScatterPicture:
    """Density across, on a logarithmic scale, and norm or strongest activation upwards."""
    densities = [*scatter.density, *([scatter.own_density] if scatter.own_density else [])] or [1.0]
    values = [*scatter.value, scatter.own_value]
    low_density, high_density, low, high = min(densities), max(densities), min(values), max(values)

    def place(density: float, value: float) -> tuple[float, float]:
        across = log10(density / low_density) / (log10(high_density / low_density) or 1.0)
        return WIDTH * across, SCATTER_HEIGHT * (1 - (value - low) / ((high - low) or 1.0))

    points = [place(density, value) for density, value in zip(scatter.density, scatter.value, strict=True)]
    return ScatterPicture(
        path="".join(f"M{x:.0f} {y:.0f}h0" for x, y in points),
        own=place(scatter.own_density, scatter.own_value) if scatter.own_density else None,
        word="norm" if scatter.by == "norm" else "strongest activation",
        low_density=low_density,
        high_density=high_density,
        low=low,
        high=high,
    )


def _log_share(count: int, highest: int) -> float:
    """The height of a bar: 1 for the highest, and a tenth for a count of one beside one of ten thousand."""
    return (log10(count) + 0.4) / (log10(highest) + 0.4)
