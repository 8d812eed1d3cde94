"""Which placement group of ranks trains which SAE: by predicted cost, so that the groups' steps take alike.

The longest steps are placed first, each in the group with the least to do (Graham 1969, longest processing time first).
An SAE that joins later goes to the group that has the least then, and none moves while the run lasts.
"""

from __future__ import annotations

from collections.abc import Mapping


def place(costs: Mapping[str, float], groups: int, placed: Mapping[str, int] | None = None) -> dict[str, int]:
    """The group of each SAE in `costs`, seconds of a step by name; those in `placed` stay where they are."""
    group_of = {name: group for name, group in (placed or {}).items() if name in costs}
    loads = [0.0] * groups
    for name, group in group_of.items():
        loads[group] += costs[name]
    for name in sorted(costs.keys() - group_of.keys(), key=lambda name: (-costs[name], name)):
        group = min(range(groups), key=lambda index: (loads[index], index))
        group_of[name] = group
        loads[group] += costs[name]
    return {name: group_of[name] for name in costs}
