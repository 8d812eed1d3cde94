"""The frontier of sparsity and quality: the SAEs than which no other one is both sparser and better."""

from __future__ import annotations

from collections.abc import Sequence


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (L0, loss) that no other point is below in one number without being above in the other.

    In ascending order of L0. Of equal points, all are on it.
    """
    ranking = sorted(range(len(points)), key=lambda index: points[index])
    on_it: list[int] = []
    for index in ranking:
        l0, loss = points[index]
        if not on_it or loss < points[on_it[-1]][1] or points[on_it[-1]] == (l0, loss):
            on_it.append(index)
    return on_it
