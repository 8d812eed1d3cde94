"""SAEs as a table, from their names: layers × sites of a suite (`mlp.0`, `mlp.1`, …), sizes × k of a grid
(`topk-512-8`, …). Plain data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from monitor.evaluation.measures import Stage, get

SUITE_MEASURES = (
    get("fvu", Stage.TRAINING),
    get("ce_delta", Stage.HELD_OUT),
    get("dead_latents_ratio", Stage.TRAINING),
)
"""Shown of each SAE of a suite."""
LEAST_SAES = 6
"""Fewer are shown as rows."""
_CELL = re.compile(r"(?P<name>.*\D)-(?P<d_sae>\d+)-(?P<k>\d+)")
_NAME = re.compile(r"(?P<before>.*?)[._-]?(?P<layer>\d+)(?P<after>\D*)")


@dataclass(frozen=True)
class Suite:
    """SAEs by layer and site; of a grid, by number of latents and k."""

    layers: list[int]
    sites: list[str]
    names: dict[tuple[int, str], str]
    """Name of the SAE at a layer and site; not every place need have one."""
    heading: str = "layer"
    """What `layers` are."""

    def row(self, layer: int) -> list[str | None]:
        """Names of the SAEs of a layer, one for each site."""
        return [self.names.get((layer, site)) for site in self.sites]


def suite_of(names: Sequence[str]) -> Suite | None:
    """The suite or grid that these SAEs form: every name has its place. None when they form none."""
    return _grid_of(names) or _layers_of(names)


def _grid_of(names: Sequence[str]) -> Suite | None:
    """Names as `trainer.saes.grid` gives them, NAME-D_SAE-K."""
    matches = {name: match for name in names if (match := _CELL.fullmatch(name))}
    if not matches or len(matches) < max(LEAST_SAES, len(names)):
        return None
    is_one = len({match["name"] for match in matches.values()}) == 1
    by_k = sorted(matches, key=lambda name: (matches[name]["name"], int(matches[name]["k"])))
    titles = {
        name: f"k = {match['k']}" if is_one else f"{match['name']}, k = {match['k']}" for name, match in matches.items()
    }
    sizes = sorted({int(match["d_sae"]) for match in matches.values()})
    places = {(int(match["d_sae"]), titles[name]): name for name, match in matches.items()}
    return Suite(sizes, list(dict.fromkeys(titles[name] for name in by_k)), places, heading="latents")


def _layers_of(names: Sequence[str]) -> Suite | None:
    """Names that end with a layer."""
    places: dict[tuple[int, str], str] = {}
    for name in names:
        if (match := _NAME.fullmatch(name)) is None or not (site := f"{match['before']}{match['after']}".strip("._-")):
            return None
        places[int(match["layer"]), site] = name
    layers, sites = sorted({layer for layer, _ in places}), list(dict.fromkeys(site for _, site in places))
    if len(places) < max(LEAST_SAES, len(names)) or len(layers) < 2:
        return None
    return Suite(layers, sites, places)
