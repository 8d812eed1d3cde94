"""The run's training text in a tuning: batches of windows in an order that the seed decides; held-out shards never.

A few shards are read at a time and their windows drawn in a random order. A `Cursor` says how far a tuning has come: it
goes on there after it was stopped, with the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from producer.corpus import Text
from producer.corpus.rendering.windows import Windows, join_windows, select_windows, separated, windows_of

SHARDS_AT_ONCE = 4
"""Shards whose windows are mixed."""


@dataclass(frozen=True)
class Cursor:
    """How many windows of how many groups of shards were read; groups are counted on from epoch to epoch."""

    group: int = 0
    window: int = 0


class TuningText:
    """Windows of the shards that the run trains on."""

    def __init__(self, text: Text, tokenizer: Any, seed: int, windows: int) -> None:
        """`windows` of a batch."""
        self._text = text
        self._tokenizer = tokenizer
        self._seed = seed
        self._windows = windows
        # The numbers of a mixture are all for training; a corpus alone numbers those that are held out too.
        self._shards = np.arange(text.shards) if text.shares else np.array(text.parts[0].corpus.training_shards)
        self._groups = -(-len(self._shards) // SHARDS_AT_ONCE)

    def batches(self, cursor: Cursor) -> Iterator[tuple[Windows, Cursor]]:
        """Batches from `cursor` on, without end, each with the cursor behind it. Raises CorpusError.

        The last of a group of shards may have fewer windows. Ends where a whole epoch has no text.
        """
        empty_groups = 0
        while empty_groups < self._groups:
            windows = self._group(cursor.group)
            empty_groups = 0 if len(windows) else empty_groups + 1
            for first in range(cursor.window, len(windows), self._windows):
                end = min(first + self._windows, len(windows))
                yield select_windows(windows, slice(first, end)), Cursor(cursor.group, end)
            cursor = Cursor(cursor.group + 1)

    def _group(self, number: int) -> Windows:
        """The windows of a group of shards, those without kept positions left out, in random order."""
        epoch, place = divmod(number, self._groups)
        order = np.random.default_rng([self._seed, epoch]).permutation(self._shards)
        shards = order[place * SHARDS_AT_ONCE : (place + 1) * SHARDS_AT_ONCE]
        windows = join_windows(self._read(int(shard), epoch) for shard in shards)
        useful = np.flatnonzero(windows.kept.any(1))
        return select_windows(windows, np.random.default_rng([self._seed, epoch, place]).permutation(useful))

    def _read(self, shard: int, epoch: int) -> Windows:
        part, number = self._text.find(shard, epoch)
        return windows_of(part.corpus.documents(number), self._tokenizer, separated(part.settings))
