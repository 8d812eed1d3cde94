"""The table of a suite on the live page: a row for each layer, columns for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monitor.evaluation.measures import Measure
from monitor.suite import SUITE_MEASURES, suite_of


@dataclass(frozen=True)
class SuiteTable:
    """The variables of the template."""

    heading: str
    """What the rows are."""
    sites: list[str]
    headings: list[str | None]
    """Of the cells of each site."""
    rows: list[tuple[int, list[list[str]]]]
    """Layers or numbers of latents, and the cells of each site."""


def suite_table(cells: Mapping[str, Sequence[str]], columns: Sequence[Measure]) -> SuiteTable | None:
    """The SAEs as layers × sites; None where they form no suite. `cells` of each SAE are those of `columns`."""
    if (suite := suite_of(list(cells))) is None:
        return None
    places = [columns.index(measure) for measure in SUITE_MEASURES]
    shown: dict[str | None, list[str]] = {name: [row[place] for place in places] for name, row in cells.items()}
    absent = ["–"] * len(places)
    rows = [(layer, [shown.get(name, absent) for name in suite.row(layer)]) for layer in suite.layers]
    return SuiteTable(suite.heading, suite.sites, [measure.page_heading for measure in SUITE_MEASURES], rows)
