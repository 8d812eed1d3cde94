"""HTML out of plain data: templates that escape everything, and the filters with which they write numbers and tokens.

A number that is not known is a dash, never a zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from math import log10
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

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
    filters = (number, percentage, format_bytes, format_count, visible, shaded, density_share)
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals |= {
        "latent_address": latent_address,
        "query": lambda **values: "/?" + urlencode(values),
        "histogram": histogram,
        "stylesheet": Markup((STATIC / "page.css").read_text("utf-8")),
    }
    return environment


def latent_address(sae: str, index: int) -> str:
    return f"/latents/{quote(sae)}/{index}"


# --- Numbers ---------------------------------------------------------------------------------------------------------


def number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else DASH


def percentage(value: Any) -> str:
    """Two digits that mean something: 0.00042 is 0.042 %."""
    if not isinstance(value, int | float):
        return DASH
    return "0 %" if value == 0 else f"{100 * value:.2g} %" if value < 0.0995 else f"{100 * value:.0f} %"


def density_share(density: float) -> float:
    """Of a meter: none for one row in a hundred thousand, all of it for every row; five decades."""
    return min(1.0, max(0.0, 1 + log10(density) / 5)) if density else 0.0


# --- Tokens ----------------------------------------------------------------------------------------------------------


def visible(text: str) -> Markup:
    """Line ends are marked and do not break the line, indentation is kept short."""
    shown = re.sub(r"[^\S\n]{3,}", "  ", text.replace("\r", "").replace("\t", "  "))
    return escape(shown).replace("\n", Markup('<i class="nl">↵</i>'))


def shaded(tokens: Sequence[str], values: Sequence[float], strongest: float, at: int | None = None) -> Markup:
    """Tokens on a ground as deep as the activation is strong; negative ones on another. `at` is underlined."""
    return Markup("").join(
        _shaded(visible(token), value, strongest, place == at)
        for place, (token, value) in enumerate(zip(tokens, values, strict=True))
    )


def _shaded(token: Markup, value: float, strongest: float, is_at: bool) -> Markup:
    if not value and not is_at:
        return token
    classes = "t" + (" at" if is_at else "") + (" neg" if value < 0 else "")
    depth = min(1.0, abs(value / strongest)) if strongest else 0.0
    return Markup('<span class="{}" style="--a:{:.2f}" title="{:.3g}">{}</span>').format(classes, depth, value, token)


# --- Histograms ------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 360, 120


def histogram(edges: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
    """The columns of a picture of WIDTH × HEIGHT; heights are logarithmic, since most activations are weak."""
    tallest, step = max(counts, default=1), WIDTH / max(1, len(counts))
    return [
        {
            "x": index * step,
            "width": step - 1,
            "height": (HEIGHT - 4) * _log_share(count, tallest),
            "count": count,
            "low": edges[index],
            "high": edges[index + 1],
        }
        for index, count in enumerate(counts)
        if count
    ]


def _log_share(count: int, tallest: int) -> float:
    """Of the height: 1 for the tallest, and one tenth for a single one among ten thousand."""
    return (log10(count) + 0.4) / (log10(tallest) + 0.4)
