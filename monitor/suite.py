"""A suite of SAEs as layers × sites, from their names: `mlp.0`, `mlp.1`, `resid.0`, … Plain data."""

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
_NAME = re.compile(r"(?P<before>.*?)[._-]?(?P<layer>\d+)(?P<after>\D*)")


@dataclass(frozen=True)
class Suite:
    """SAEs by layer and site."""

    layers: list[int]
    sites: list[str]
    names: dict[tuple[int, str], str]
    """Name of the SAE at a layer and site; not every place need have one."""

    def row(self, layer: int) -> list[str | None]:
        """Names of the SAEs of a layer, one for each site."""
        return [self.names.get((layer, site)) for site in self.sites]


def suite_of(names: Sequence[str]) -> Suite | None:
    """The suite that these SAEs form: several sites or layers, each name with a layer. None when they form none."""
    places: dict[tuple[int, str], str] = {}
    for name in names:
        if (match := _NAME.fullmatch(name)) is None or not (site := f"{match['before']}{match['after']}".strip("._-")):
            return None
        places[int(match["layer"]), site] = name
    layers, sites = sorted({layer for layer, _ in places}), list(dict.fromkeys(site for _, site in places))
    if len(places) < max(LEAST_SAES, len(names)) or len(layers) < 2:
        return None
    return Suite(layers, sites, places)
