"""How far the default learning rate is from the best one, in groups of cells that differ in the rate alone.

Between the measured rates of a group, FVU is interpolated by a parabola in log(rate) through the three nearest cells,
or by a line where there are two. A rate beyond the measured ones has no FVU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.benchmarks.quality.bench import choice_fvu
from tests.benchmarks.quality.cells import OURS, Cell


@dataclass(frozen=True)
class Group:
    """Our TopK cells of one subject, width and length, first seed, at several rates."""

    subject: str
    d_sae: int
    tokens: int
    by_rate: dict[float, dict[str, Any]]
    """Results in the order of their rates."""

    @property
    def best_rate(self) -> float:
        return min(self.by_rate, key=lambda rate: choice_fvu(self.by_rate[rate]))

    def fvu(self, rate: float) -> float | None:
        """FVU at any rate between the measured ones; None beyond them."""
        rates = list(self.by_rate)
        if not rates[0] <= rate <= rates[-1]:
            return None
        if rate in self.by_rate:
            return choice_fvu(self.by_rate[rate])
        above = next(i for i, other in enumerate(rates) if other > rate)
        first = max(0, min(above - 1, len(rates) - 3))
        some = rates[first : first + 3]
        curve = np.polyfit(np.log(some), [choice_fvu(self.by_rate[r]) for r in some], len(some) - 1)
        return float(np.polyval(curve, math.log(rate)))

    def excess(self, rate: float) -> float | None:
        """FVU at `rate` beyond that of the best measured rate, as a share of it."""
        fvu = self.fvu(rate)
        return None if fvu is None else fvu / choice_fvu(self.by_rate[self.best_rate]) - 1


def groups(results: Mapping[str, dict[str, Any]]) -> list[Group]:
    """All groups with two rates or more; cells without a validation part are left out."""
    found: dict[tuple[str, int, int], dict[float, dict[str, Any]]] = {}
    for name, result in results.items():
        cell = Cell(**result["cell"])
        plain = OURS[0].but(subject=cell.subject, d_sae=cell.d_sae, tokens=cell.tokens, rate=cell.rate)
        if plain.name == name and "validation" in result:
            found.setdefault((cell.subject, cell.d_sae, cell.tokens), {})[cell.rate] = result
    return [Group(*key, dict(sorted(by_rate.items()))) for key, by_rate in sorted(found.items()) if len(by_rate) > 1]
