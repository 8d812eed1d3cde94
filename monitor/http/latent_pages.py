"""What the pages show of latents: the table, the latents that fire on a text, and the page of one latent.

Pure functions of what `explore` returns. The page of one latent needs no script, so that its export, a single
file, is the same page.
"""

from __future__ import annotations

from typing import Any

from monitor.http.html import render

COLUMNS = {
    "index": ("latent", "its number in the SAE"),
    "density": ("density", "share of held-out rows on which it fires"),
    "strongest": ("strongest", "its largest activation on them, in the units of the raw activations"),
    "norm": ("norm", "length of its decoder row"),
    "age": ("age", "tokens trained since its decoder row was first seen with this direction; at least"),
}
"""What the table can be sorted by: heading and meaning."""


def table(found: dict[str, Any]) -> str:
    """One page of the table. Its headings sort, by links that the script takes over."""
    return render("table.html", found=found, columns=[_column(name, found) for name in COLUMNS])


def _column(name: str, found: dict[str, Any]) -> dict[str, Any]:
    title, meaning = COLUMNS[name]
    is_order, descending = found["order"] == name, found["descending"]
    return {
        "name": name,
        "title": title,
        "meaning": meaning,
        "sort": ("descending" if descending else "ascending") if is_order else None,
        "arrow": (" ↓" if descending else " ↑") if is_order else "",
        "descending": int(not descending if is_order else name != "index"),
    }


def fires(found: dict[str, Any]) -> str:
    """The text, and the latents that fire on it, each with the text shaded by its activation."""
    return render("fires.html", found=found | {"latents": [_firing(line, found["at"]) for line in found["latents"]]})


def _firing(line: dict[str, Any], at: int | None) -> dict[str, Any]:
    here = line["values"][at] if at is not None else max(line["values"], key=abs)
    scale = max(abs(line["strongest"]), abs(here))
    return line | {"here": here, "scale": scale, "share": abs(here) / scale}


def latent_page(found: dict[str, Any], *, exported: bool = False) -> str:
    """The page of one latent; exported, it stands alone: no links into the service, no script."""
    return render("latent.html", title=f"{found['sae']} · latent {found['index']}", it=found, exported=exported)
