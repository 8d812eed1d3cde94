"""The revisions of a language model under training: which one a shard is leased with, and how much of each is trained.

With model.revisions, each epoch has the next one. With model.watch, shards are leased with the newest that a producer
has reported. A shard keeps its revision from its first activation on, so that every activation's name (epoch, shard,
position) stands for one revision, whoever computes it and however often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Revisions:
    """The books on revisions. For a model that does not change, everything is empty."""

    def __init__(self, plan: Sequence[str] = (), is_watching: bool = False) -> None:
        """`plan` are those of model.revisions, one for each epoch; `is_watching`: model.watch is set."""
        self._plan = tuple(plan)
        self._is_watching = is_watching
        self.newest = ""
        self.newest_number = 0
        self.tokens: Counter[str] = Counter()
        """Tokens trained of each revision, in the order in which they came."""
        self.bounds: dict[str, list[float]] = {}
        """Norm beyond which an activation of a revision is dropped, for each hook."""

    def of_epoch(self, epoch: int) -> str:
        """The revision for a shard of which nothing has arrived."""
        return self._plan[min(epoch, len(self._plan) - 1)] if self._plan else self.newest

    def report(self, name: str, number: int) -> bool:
        """A producer has seen a checkpoint; returns whether it is a newer one."""
        if not self._is_watching or number <= self.newest_number:
            return False
        self.newest, self.newest_number = name, number
        return True

    @property
    def last_trained(self) -> str | None:
        """The latest revision of which anything was trained; None for a model that does not change."""
        return next(reversed(self.tokens), None) if set(self.tokens) - {""} or self._plan else None
