"""Ranges of layers in the names of hooks: `blocks.{0..3}.hook_resid_post` stands for four. CONTRACT. Light."""

from __future__ import annotations

import re
from collections.abc import Iterable

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_LAYERS = 10_000


def expand_ranges(hooks: Iterable[str]) -> list[str]:
    """The hooks that these names stand for, in order. Raises ValueError for a range that is none."""
    return [name for hook in hooks for name in _expand(hook)]


def _expand(hook: str) -> list[str]:
    match = RANGE.search(hook)
    if match is None:
        return [hook]
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST_LAYERS:
        raise ValueError(f"{hook}: the range goes from {first} to {last}; write the lower layer first")
    numbers = range(first, last + 1)
    return expand_ranges(f"{hook[: match.start()]}{number}{hook[match.end() :]}" for number in numbers)
