"""The shuffling buffer: rows in, batches out, each row exactly once.

One preallocated tensor per hook and one permutation of its slots: the first `rows` entries of `_order` name filled
slots, the rest free ones. A batch is drawn without replacement from all filled slots; what was drawn is swapped
behind the border and its slots are free at once. Nothing is ever concatenated, copied twice or reshuffled, so the
memory is capacity × row bytes plus 24 bytes of bookkeeping per slot, from the start.

Rows of several hooks share a slot: one draw gives the same tokens for every hook.

Rows are brought in by the socket's thread, with numpy: one thread, which leaves the interpreter and torch's threads to
the training, and copies a row at once where torch goes element by element.

`OrderedBuffer` is the buffer of deterministic mode: what it hands out does not depend on when rows arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer.state.format import BufferState
from trainer.stream.payload import bits_of


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
        self._put(self._order[self.rows : end], x, serial, position)
        self.rows = end

    def is_full_enough(self, count: int, oldest: int) -> bool:
        """Whether a batch of `count` may be drawn: the buffer is half full, so that each batch mixes many contexts.

        Every activation of the serials below `oldest` is here.
        """
        return self.rows >= max(count, self.capacity // 2)

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
        rows = self._rows_to_peek_at
        picked = np.random.default_rng(0).choice(rows, min(count, rows), replace=False)
        return self._gather(self._order[picked]).x

    @property
    def _rows_to_peek_at(self) -> int:
        return self.rows

    def _put(
        self, slots: np.ndarray, x: Sequence[torch.Tensor | np.ndarray], serial: int, position: np.ndarray
    ) -> None:
        for store, rows in zip(self._bits, x, strict=True):
            store[slots] = bits_of(rows)
        self._serial[slots] = serial
        self._position[slots] = position

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

    @property
    def held(self) -> int:
        """Rows in memory, those included that may not be drawn yet."""
        return self.rows

    def state(self) -> BufferState:
        """The state of the draw, without the activations."""
        return BufferState(dict(self._random.bit_generator.state))

    def restore(self, state: BufferState) -> None:
        """Goes on drawing where `state` was taken."""
        if state.random is not None:
            self._random.bit_generator.state = state.random


class OrderedBuffer(ShuffleBuffer):
    """A buffer whose batches are a function of the run alone, whoever brings the rows and when.

    Batches are drawn from the *pool*, half of the slots. Rows enter it in the corpus' order, serial after serial and
    position after position, and a batch is drawn only when it is full: after each step exactly as many rows enter as
    were drawn, and which index of the pool a row has follows from the step. Rows that come before their turn wait in
    the other half. At the end of the data the pool runs empty.

    Rows that enter after a draw take their places behind those that it left, the *settled* ones. So these are the
    same at each step, however far the refill has come: they are what `peek` looks at, and their names, in the pool's
    order, are what a checkpoint keeps. After a restart rows of these names go back to their places, and the refill
    begins when all of them are there.
    """

    def __init__(self, capacity: int, widths: list[int], dtype: torch.dtype, seed: int) -> None:
        super().__init__(capacity, widths, dtype, seed)
        self.pool = pool_rows(capacity)
        self._spare = np.arange(capacity)
        self._spares = capacity
        """The first so many entries of `_spare` are the free slots."""
        self._waiting: dict[int, deque[np.ndarray]] = {}
        """By serial, the slots of rows whose turn has not come, in order of position."""
        self._settled = 0
        self._named = np.zeros((2, 0), np.int64)
        """Serials and positions that a checkpoint named, in the pool's order."""
        self._missing = 0
        """How many of these have not come back yet."""

    @property
    def held(self) -> int:
        return self.capacity - self._spares

    def insert(self, x: Sequence[torch.Tensor | np.ndarray], serial: int, position: np.ndarray) -> None:
        """As `ShuffleBuffer.insert`; rows of one serial come in ascending order of position."""
        if len(position) > self._spares:
            raise OverflowError(f"{len(position)} rows do not fit: {self.held} of {self.capacity} are taken")
        spares = self._spares - len(position)
        slots = self._spare[spares : self._spares].copy()
        self._put(slots, x, serial, position)
        self._spares = spares
        if self._missing:
            slots = self._put_back(serial, position, slots)
        self._waiting.setdefault(serial, deque()).append(slots)

    def is_full_enough(self, count: int, oldest: int) -> bool:
        """Lets rows into the pool whose turn has come, and says whether it is full."""
        return self.fill(oldest)

    def fill(self, oldest: int) -> bool:
        """Lets rows into the pool whose turn has come, and says whether it is full.

        Every row of the serials below `oldest` is here, and of `oldest` a first part.
        """
        if self._missing:
            return False
        for serial in sorted(serial for serial in self._waiting if serial <= oldest):
            queue = self._waiting[serial]
            while queue and self.rows < self.pool:
                slots = queue.popleft()
                enter, later = np.split(slots, [self.pool - self.rows])
                if len(later):
                    queue.appendleft(later)
                self._order[self.rows : self.rows + len(enter)] = enter
                self.rows += len(enter)
            if not queue:
                del self._waiting[serial]
        return self.rows == self.pool

    @property
    def _rows_to_peek_at(self) -> int:
        """The settled ones; before the first draw, the whole pool."""
        return self._settled or self.rows

    def _free(self, picked: np.ndarray, slots: np.ndarray) -> None:
        super()._free(picked, slots)
        self._spare[self._spares : self._spares + len(slots)] = slots
        self._spares += len(slots)
        self._settled = self.rows

    def _put_back(self, serial: int, position: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Takes those rows to their places that a checkpoint names there; the slots of the others."""
        places = np.flatnonzero(self._named[0] == serial)
        places = places[np.argsort(self._named[1, places])]
        names = self._named[1, places]
        known = np.isin(position, names)
        self._order[places[np.searchsorted(names, position[known])]] = slots[known]
        self._missing -= int(known.sum())
        if not self._missing:
            self.rows = self._settled = self._named.shape[1]
        return slots[~known]

    def state(self) -> BufferState:
        """No row, but the settled ones' names, int64 serials and positions in the pool's order."""
        slots = self._order[: self._settled]
        names = self._named if self._missing else np.stack([self._serial[slots], self._position[slots]])
        return BufferState(super().state().random, names)

    def restore(self, state: BufferState) -> None:
        super().restore(state)
        if state.names is not None:
            self._named = state.names
            self._missing = self._named.shape[1]


def pool_rows(capacity: int) -> int:
    """Of a buffer that hands rows out in deterministic mode: how many it draws from."""
    return capacity // 2


def same_context_mates(batch: Batch, context: int) -> float:
    """How many other rows of its own window a row finds in its batch, on average; 0 is perfect mixing.

    Effective batch ≈ batch / (1 + mates × correlation within a context). Source: the design effect of clustered
    samples (Kish 1965).
    """
    window = batch.serial * (1 << 32) + batch.position // context
    _, counts = np.unique(window, return_counts=True)
    return float((counts * (counts - 1)).sum() / max(len(window), 1))
