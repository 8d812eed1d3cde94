"""The shuffling buffer: rows in, batches out, each row exactly once.

One preallocated tensor per hook and one permutation of its slots: the first `rows` entries of `_order` name filled
slots, the rest free ones. A batch is drawn without replacement from all filled slots; what was drawn is swapped
behind the border and its slots are free at once. Nothing is ever concatenated, copied twice or reshuffled, so the
memory is capacity × row bytes plus 24 bytes of bookkeeping per slot, from the start.

Rows of several hooks share a slot: one draw gives the same tokens for every hook.

Rows are brought in by the socket's thread, with numpy: one thread, which leaves the interpreter and torch's threads to
the training, and copies a row at once where torch goes element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Rows drawn together. `serial` and `position` are the rows' names in the ledger, both int64 [batch]."""

    x: list[torch.Tensor]
    """One [batch, width] per hook, in the buffer's dtype."""
    serial: np.ndarray
    position: np.ndarray


class ShuffleBuffer:
    """A buffer of `capacity` rows. Not thread-safe: the owner locks around each call."""

    def __init__(self, capacity: int, widths: list[int], dtype: torch.dtype, seed: int) -> None:
        self.capacity = capacity
        self.rows = 0
        self._x = [torch.empty(capacity, width, dtype=dtype) for width in widths]
        self._bits = [bits_of(x) for x in self._x]
        self._serial = np.zeros(capacity, np.int64)
        self._position = np.zeros(capacity, np.int64)
        self._order = np.arange(capacity)
        self._random = np.random.default_rng(seed)

    @property
    def nbytes(self) -> int:
        """Bytes held, bookkeeping included."""
        books = self._serial.nbytes + self._position.nbytes + self._order.nbytes
        return books + sum(x.nbytes for x in self._x)

    def insert(self, x: Sequence[torch.Tensor | np.ndarray], serial: int, position: np.ndarray) -> None:
        """Copies rows in, once: x[hook] is [rows, width], `position` [rows] their places in shard `serial`.

        An array holds the numbers' bits, as integers. Raises OverflowError when they do not fit; credit makes that
        impossible.
        """
        end = self.rows + len(position)
        if end > self.capacity:
            raise OverflowError(f"{len(position)} rows do not fit: {self.rows} of {self.capacity} are taken")
        slots = self._order[self.rows : end]
        for store, rows in zip(self._bits, x, strict=True):
            store[slots] = bits_of(rows)
        self._serial[slots] = serial
        self._position[slots] = position
        self.rows = end

    def draw(self, count: int) -> Batch:
        """Takes `count` rows out, uniformly without replacement. Raises ValueError when there are fewer."""
        if count > self.rows:
            raise ValueError(f"asked for {count} rows, the buffer holds {self.rows}")
        picked = self._random.choice(self.rows, count, replace=False)
        slots = self._order[picked]
        batch = self._gather(slots)
        self._free(picked, slots)
        return batch

    def peek(self, count: int) -> list[torch.Tensor]:
        """A copy of `count` random rows per hook, which stay in the buffer (for estimating scale and centre)."""
        picked = np.random.default_rng(0).choice(self.rows, min(count, self.rows), replace=False)
        return self._gather(self._order[picked]).x

    def _gather(self, slots: np.ndarray) -> Batch:
        index = torch.from_numpy(slots)
        return Batch([store.index_select(0, index) for store in self._x], self._serial[slots], self._position[slots])

    def _free(self, picked: np.ndarray, slots: np.ndarray) -> None:
        """Moves the picked entries behind the new border; those of the tail that stay fill the holes."""
        border = self.rows - len(picked)
        stays = np.ones(len(picked), bool)
        stays[picked[picked >= border] - border] = False
        holes = picked[picked < border]
        self._order[holes] = self._order[border : self.rows][stays]
        self._order[border : self.rows] = slots
        self.rows = border

    def random_state(self) -> dict[str, Any]:
        return dict(self._random.bit_generator.state)

    def restore_random_state(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state


def bits_of(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """The same memory as integers, since numpy does not know bfloat16; an array is taken to be that already."""
    return x if isinstance(x, np.ndarray) else x.view({2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()


def same_context_mates(batch: Batch, context: int) -> float:
    """How many other rows of its own window a row finds in its batch, on average; 0 is perfect mixing.

    Effective batch ≈ batch / (1 + mates × correlation within a context). Definition: algorithms.md §8.
    """
    window = batch.serial * (1 << 32) + batch.position // context
    _, counts = np.unique(window, return_counts=True)
    return float((counts * (counts - 1)).sum() / max(len(window), 1))
