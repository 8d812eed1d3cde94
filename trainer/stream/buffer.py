"""The shuffling buffer: activations in, batches out, each activation exactly once.

One preallocated tensor per hook and one permutation of its slots: the first `rows` entries of `_order` name filled
slots, the rest free ones. A batch is drawn without replacement from all filled slots; what was drawn is swapped
behind the border and its slots are free at once. Nothing is ever concatenated, copied twice or reshuffled, so the
memory is capacity × bytes of an activation plus 24 bytes of bookkeeping per slot, from the start.

Activations of one token at several hooks share a slot: one draw gives the same tokens for every hook.

The socket's thread inserts with numpy: in one thread, which leaves the interpreter and torch's threads to the training,
and copies an activation at once where torch goes element by element.

`OrderedBuffer` is the buffer of deterministic mode: its batches do not depend on when activations arrive.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from trainer.state.format import BufferState
from trainer.stream.payload import bits_of

HUGE_PAGE_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Batch:
    """Activations drawn together. `serial` and `position` are their names in the ledger, both int64 [batch]."""

    x: list[torch.Tensor]
    """One [batch, width] per hook, in the buffer's dtype."""
    serial: np.ndarray
    position: np.ndarray


class ShuffleBuffer:
    """A buffer of `capacity` slots. Not thread-safe: the owner locks around each call."""

    def __init__(self, capacity: int, widths: list[int], dtype: torch.dtype, seed: int) -> None:
        self.capacity = capacity
        self.rows = 0
        """Activations that can be drawn."""
        self._x = [_allocate(capacity, width, dtype) for width in widths]
        self._bits = [bits_of(x) for x in self._x]
        self._serial = np.zeros(capacity, np.int64)
        self._position = np.zeros(capacity, np.int64)
        self._order = np.arange(capacity)
        self._random = np.random.default_rng(seed)

    @property
    def nbytes(self) -> int:
        """Bytes held, bookkeeping included."""
        bookkeeping = self._serial.nbytes + self._position.nbytes + self._order.nbytes
        return bookkeeping + sum(x.nbytes for x in self._x)

    def insert(self, x: Sequence[torch.Tensor | np.ndarray | None], serial: int, position: np.ndarray) -> None:
        """Copies activations in, once: x[hook] is [rows, width], `position` [rows] their positions in shard `serial`.

        None may stand for a hook that is forgotten. An array holds the numbers' bits, as integers. Raises OverflowError
        when they do not fit; credit makes that impossible.
        """
        end = self.rows + len(position)
        if end > self.capacity:
            raise OverflowError(f"{len(position)} activations do not fit: {self.rows} of {self.capacity} slots full")
        self._put(self._order[self.rows : end], x, serial, position)
        self.rows = end

    def forget(self, hook: int) -> None:
        """Gives the memory of a hook back, by its number; activations have no numbers of it from now on, [rows, 0]."""
        if self._x[hook].shape[1]:
            self._x[hook] = torch.empty(self.capacity, 0, dtype=self._x[hook].dtype)
            self._bits[hook] = bits_of(self._x[hook])

    def is_full_enough(self, count: int, oldest: int) -> bool:
        """Whether a batch of `count` may be drawn: the buffer is half full, so that each batch mixes many contexts.

        Every activation of the serials below `oldest` is here.
        """
        return self.rows >= max(count, self.capacity // 2)

    def draw(self, count: int) -> Batch:
        """Takes `count` activations out, uniformly without replacement. Raises ValueError when there are fewer."""
        if count > self.rows:
            raise ValueError(f"a batch of {count} activations was requested, the buffer holds {self.rows}")
        entries = self._random.choice(self.rows, count, replace=False)
        slots = self._order[entries]
        batch = self._gather(slots)
        self._free(entries, slots)
        return batch

    def peek(self, count: int) -> list[torch.Tensor]:
        """A copy of `count` random activations per hook, which stay (for estimating scale and centre)."""
        rows = self._peekable_rows
        entries = np.random.default_rng(0).choice(rows, min(count, rows), replace=False)
        return self._gather(self._order[entries]).x

    @property
    def _peekable_rows(self) -> int:
        return self.rows

    def _put(
        self, slots: np.ndarray, x: Sequence[torch.Tensor | np.ndarray | None], serial: int, position: np.ndarray
    ) -> None:
        for store, rows in zip(self._bits, x, strict=True):
            if store.shape[1] and rows is not None:
                store[slots] = bits_of(rows)
        self._serial[slots] = serial
        self._position[slots] = position

    def _gather(self, slots: np.ndarray) -> Batch:
        index = torch.from_numpy(slots)
        return Batch([store.index_select(0, index) for store in self._x], self._serial[slots], self._position[slots])

    def _free(self, entries: np.ndarray, slots: np.ndarray) -> None:
        """Moves these entries of the order behind the new border; those of the tail that stay fill the holes."""
        border = self.rows - len(entries)
        stays = np.ones(len(entries), bool)
        stays[entries[entries >= border] - border] = False
        holes = entries[entries < border]
        self._order[holes] = self._order[border : self.rows][stays]
        self._order[border : self.rows] = slots
        self.rows = border

    @property
    def used_slots(self) -> int:
        """Activations in memory, those included that may not be drawn yet."""
        return self.rows

    def state(self) -> BufferState:
        """The state of the draw, without the activations."""
        return BufferState(dict(self._random.bit_generator.state))

    def restore(self, state: BufferState) -> None:
        """Goes on drawing where `state` was taken."""
        if state.random is not None:
            self._random.bit_generator.state = state.random


def _allocate(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor [rows, width], in huge pages where the system has them.

    Slots are written and read in random order: with pages of 4 KiB each row costs a walk through the page table.
    """
    nbytes = rows * width * dtype.itemsize
    if nbytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype).view(rows, width)
    return torch.empty(rows, width, dtype=dtype)


class OrderedBuffer(ShuffleBuffer):
    """A buffer whose batches are a function of the run alone, whoever brings the activations and when.

    Batches are drawn from the *pool*, half of the slots. Activations enter it in the corpus' order, serial after serial
    and position after position, and a batch is drawn only when it is full: after each step exactly as many enter as
    were drawn, and which index of the pool an activation has follows from the step. Those that come before their turn
    wait in the other half. At the end of the data the pool runs empty.

    Activations that enter after a draw take their places behind those that it left, the *settled* ones. So these are
    the same at each step, however far the refill has come: `peek` looks at them, and a checkpoint keeps their names, in
    the pool's order. After a restart the activations of these names go back to their places, and the refill begins when
    all of them are there.
    """

    def __init__(self, capacity: int, widths: list[int], dtype: torch.dtype, seed: int) -> None:
        super().__init__(capacity, widths, dtype, seed)
        self.pool = pool_rows(capacity)
        self._free_slots = np.arange(capacity)
        self._free_count = capacity
        """The first so many entries of `_free_slots` are free."""
        self._waiting: dict[int, deque[np.ndarray]] = {}
        """Slots of activations whose turn has not come, by serial, in order of position."""
        self._settled_rows = 0
        """The first so many of the pool were there at the last draw."""
        self._saved_names = np.zeros((2, 0), np.int64)
        """Serials and positions of the settled ones in a checkpoint, in the pool's order."""
        self._missing_rows = 0
        """How many of these have not come back yet."""

    @property
    def used_slots(self) -> int:
        return self.capacity - self._free_count

    def insert(self, x: Sequence[torch.Tensor | np.ndarray | None], serial: int, position: np.ndarray) -> None:
        """Like `ShuffleBuffer.insert`; activations of one serial come in ascending order of position."""
        if len(position) > self._free_count:
            raise OverflowError(
                f"{len(position)} activations do not fit: {self.used_slots} of {self.capacity} slots full"
            )
        free_count = self._free_count - len(position)
        slots = self._free_slots[free_count : self._free_count].copy()
        self._put(slots, x, serial, position)
        self._free_count = free_count
        if self._missing_rows:
            slots = self._restore_places(serial, position, slots)
        self._waiting.setdefault(serial, deque()).append(slots)

    def is_full_enough(self, count: int, oldest: int) -> bool:
        """Whether the pool is full, once those whose turn has come are in it."""
        return self.fill(oldest)

    def fill(self, oldest: int) -> bool:
        """Lets activations into the pool whose turn has come, and returns whether it is full.

        All of the serials below `oldest` are here, and of `oldest` a first part.
        """
        if self._missing_rows:
            return False
        for serial in sorted(serial for serial in self._waiting if serial <= oldest):
            queue = self._waiting[serial]
            while queue and self.rows < self.pool:
                slots = queue.popleft()
                now, later = np.split(slots, [self.pool - self.rows])
                if len(later):
                    queue.appendleft(later)
                self._order[self.rows : self.rows + len(now)] = now
                self.rows += len(now)
            if not queue:
                del self._waiting[serial]
        return self.rows == self.pool

    @property
    def _peekable_rows(self) -> int:
        """The settled ones; before the first draw, the whole pool."""
        return self._settled_rows or self.rows

    def _free(self, entries: np.ndarray, slots: np.ndarray) -> None:
        super()._free(entries, slots)
        self._free_slots[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)
        self._settled_rows = self.rows

    def _restore_places(self, serial: int, position: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Takes the activations that a checkpoint names to their places; returns the slots of the others."""
        places = np.flatnonzero(self._saved_names[0] == serial)
        places = places[np.argsort(self._saved_names[1, places])]
        names = self._saved_names[1, places]
        is_saved = np.isin(position, names)
        self._order[places[np.searchsorted(names, position[is_saved])]] = slots[is_saved]
        self._missing_rows -= int(is_saved.sum())
        if not self._missing_rows:
            self.rows = self._settled_rows = self._saved_names.shape[1]
        return slots[~is_saved]

    def state(self) -> BufferState:
        """The state of the draw, and the settled ones' names: int64 serials and positions in the pool's order."""
        slots = self._order[: self._settled_rows]
        names = self._saved_names if self._missing_rows else np.stack([self._serial[slots], self._position[slots]])
        return BufferState(super().state().random, names)

    def restore(self, state: BufferState) -> None:
        super().restore(state)
        if state.names is not None:
            self._saved_names = state.names
            self._missing_rows = self._saved_names.shape[1]


def pool_rows(capacity: int) -> int:
    """Slots of the pool in a buffer of deterministic mode."""
    return capacity // 2


def same_context_mates(batch: Batch, context: int) -> float:
    """How many other activations of its window an activation finds in its batch, on average; 0 is perfect mixing.

    Effective batch ≈ batch / (1 + mates × correlation within a context). Source: the design effect of clustered
    samples (Kish 1965).
    """
    window = batch.serial * (1 << 32) + batch.position // context
    _, counts = np.unique(window, return_counts=True)
    return float((counts * (counts - 1)).sum() / max(len(window), 1))
