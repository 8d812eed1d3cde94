"""Deterministic mode against the same adversary as tests/test_ledger_machine.py: what is drawn never depends on it.

Whatever was lost, repeated, killed or restored from a checkpoint, the batches of the surviving lineage are those that
tokens in perfect order give.

    SLUICE_HYPOTHESIS_STEPS=400 pytest tests/test_ordered_machine.py     # 400 examples of 400 steps, at random
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from producer.wire import Chunk
from tests.test_ledger_machine import (
    CONTEXT,
    DEAD_SECONDS,
    SHARDS,
    STALL_SECONDS,
    STEPS,
    WIDTH,
    Name,
    Shard,
    Stream,
    move,
    shards,
)
from trainer.state.format import NEW_BUFFER, BufferState
from trainer.stream.buffer import OrderedBuffer, pool_rows
from trainer.stream.ledger.credit import CreditPolicy, OrderedCredit
from trainer.stream.ledger.ledger import Limits
from trainer.stream.ledger.shards import epoch_order

CHUNK_WINDOWS = 2
FAR = 1 << 30
"""A serial beyond all: rows below it may be drawn."""


class OrderedStream(Stream):
    """`Stream` in deterministic mode: tokens wait for their turn, and draws are noted."""

    buffer: OrderedBuffer

    @initialize(
        corpus=st.lists(shards(), min_size=SHARDS, max_size=SHARDS),
        capacity=st.sampled_from((32, 37, 64)),
        epochs=st.sampled_from((1, 3, 9)),
    )
    def start(self, corpus: list[Shard], capacity: int, epochs: int) -> None:
        # A shard that is given up ends a deterministic run.
        self.corpus = [replace(shard, fate="sound") for shard in corpus]
        self.limits = Limits(capacity, 0, epochs, 1.0, DEAD_SECONDS, STALL_SECONDS)
        self.now = 0.0
        self.starts = self.producer_count = 0
        self.producers, self.zombies, self.checkpoint = [], [], None
        self.saved: tuple[BufferState, list[list[Name]]] = (NEW_BUFFER, [])
        self.boot()
        self.add_producer()

    def policy(self) -> CreditPolicy:
        capacity = self.limits.capacity
        return OrderedCredit(capacity - pool_rows(capacity), DEAD_SECONDS)

    def boot(self) -> None:
        super().boot()
        self.buffer = OrderedBuffer(self.limits.capacity, [WIDTH], torch.float32, seed=0)
        state, drawn_rows = deepcopy(self.saved)
        self.buffer.restore(state)
        self.batches = drawn_rows
        """The batches of this lineage, as (serial, position) of each row."""

    def write_checkpoint(self) -> None:
        super().write_checkpoint()
        self.saved = deepcopy((self.buffer.state(), self.batches))

    # The moves that are others here

    @move(chatty=st.booleans(), fingerprint=st.sampled_from(("ours", "theirs")))
    def join(self, chatty: bool, fingerprint: str) -> None:
        """Every producer has the same tokens per chunk."""
        if len(self.producers) < 4:
            self.add_producer(CHUNK_WINDOWS, chatty, fingerprint)

    @move(count=st.integers(1, 16))
    def take(self, count: int) -> None:
        """A batch is drawn as soon as it may be; its step is done in the next round, or never."""
        if self.batch is None and self.may_draw():
            self.draw(count)

    @move()
    def wind_down(self) -> None:
        """`ctl drain` is refused."""

    # What must hold

    def may_draw(self) -> bool:
        return self.buffer.fill(self.ledger.shards.oldest) or (
            not self.ledger.phase.is_receiving and self.buffer.rows > 0
        )

    def may_receive(self, name: Name, chunk: Chunk) -> bool:
        """What comes early finds room, but for the pool's and a chunk's."""
        open_shards = {(shard.epoch, shard.shard): shard for shard in self.ledger.shards.open.values()}
        if name not in open_shards or open_shards[name].serial <= self.ledger.shards.oldest:
            return True
        early = sum(
            len(
                self.books.had.get(one, set())
                - self.books.trained.get(one, set())
                - self.books.discarded.get(one, set())
            )
            for one, shard in open_shards.items()
            if shard.serial > self.ledger.shards.oldest
        )
        room = self.limits.capacity - pool_rows(self.limits.capacity) - CHUNK_WINDOWS * CONTEXT
        return early + chunk.rows <= room

    def has_other_shards(self, name: Name) -> bool:
        """What comes later in the order cannot be asked for instead."""
        return False

    def draw(self, count: int) -> None:
        super().draw(count)
        self.batches.append(self.names_in_batch())

    def is_over(self) -> bool:
        """A shard given up, as by producers that hang on it time and again, ends a deterministic run."""
        return bool(self.ledger.shards.quarantined) or super().is_over()

    def balance(self) -> None:
        if not self.ledger.shards.quarantined:
            super().balance()
        assert self.batches == self.batches_in_order()

    def batches_in_order(self) -> list[list[Name]]:
        """The same draws from a buffer that is given token after token."""
        ledger = self.ledger

        def order(epoch: int) -> np.ndarray:
            assert ledger.identity.hello is not None
            return epoch_order(ledger.identity.hello, ledger.shards.seed, epoch)

        rows = iter(
            (serial, int(position))
            for serial, shard in enumerate(
                int(shard) for epoch in range(self.limits.epochs or 0) for shard in order(epoch)
            )
            for position in np.flatnonzero(self.corpus[shard].kept & ~self.corpus[shard].outliers)
        )
        buffer = OrderedBuffer(self.limits.capacity, [WIDTH], torch.float32, seed=0)
        drawn_rows = []
        for batch in self.batches:
            while not buffer.fill(FAR) and (row := next(rows, None)) is not None:
                buffer.insert([torch.zeros(1, WIDTH)], row[0], np.array([row[1]]))
            next_batch = buffer.draw(len(batch))
            drawn_rows.append(list(zip(next_batch.serial.tolist(), next_batch.position.tolist(), strict=True)))
        return drawn_rows


OrderedStream.TestCase.settings = settings(Stream.TestCase.settings, max_examples=STEPS or 30)

TestOrderedStream = OrderedStream.TestCase
