"""Link: what the producer's loop calls to receive leases and to send chunks."""

from __future__ import annotations

import time

from producer.link.connection import WakeUp
from producer.link.errors import SessionLost
from producer.link.session import PackedChunk
from producer.link.shared import SharedState
from producer.link.socket_thread import SocketThread
from producer.settings import StreamSettings
from producer.wire import Hello, Lease, ShardEnd, ShardFail, Welcome

OUTBOX_CHUNKS = 2
"""Messages that may wait for the socket: the next forward pass overlaps with sending."""
WAIT_SECONDS = 0.1
"""Longest wait before `moved_at` is updated again."""


class Link:
    """The loop's side of the stream. A context manager; its methods are for one thread."""

    def __init__(self, settings: StreamSettings, hello: Hello) -> None:
        self._state = SharedState()
        self._wake_up = WakeUp()
        self._socket_thread = SocketThread(settings, hello, self._state, self._wake_up)
        self.moved_at = time.monotonic()
        """When the loop last made progress or waited for the trainer: it stands still when the loop hangs."""
        self.stall_seconds = {"credit": 0.0, "lease": 0.0}
        """Time spent waiting for the trainer, by cause."""

    def __enter__(self) -> Link:
        self._socket_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._state.changed:
            self._state.is_closing = True
            self._state.changed.notify_all()
        self._wake_up.wake()
        self._socket_thread.close()
        self._wake_up.close()

    def next_lease(self) -> tuple[Lease, bytes, Welcome]:
        """Waits for the next shard to work on: its lease, its mask, and the terms of the session.

        Raises Finished, RefusedByTrainer or NoTrainer when there will be none.
        """
        state = self._state
        with state.changed:
            while not state.session.leases:
                if state.ending is not None:
                    raise state.ending
                self._wait("lease")
            lease, mask = state.session.leases[0]
            assert state.session.welcome is not None
            return lease, mask, state.session.welcome

    @property
    def following_lease(self) -> Lease | None:
        """The lease that `next_lease` will give after the present one, where the trainer has granted it already."""
        with self._state.changed:
            leases = self._state.session.leases
            return leases[1][0] if len(leases) > 1 else None

    def send_chunk(self, lease: Lease, chunk: PackedChunk) -> None:
        """Sends one chunk of the lease as soon as credit allows.

        Raises SessionLost when this producer does not hold the lease any more.
        """
        state = self._state
        with state.changed:
            self._check(lease)
            while not state.session.has_credit or len(state.outbox) >= OUTBOX_CHUNKS:
                self._wait("credit")
                self._check(lease)
            state.outbox.append((state.session.number_chunk(lease, chunk), chunk.payload))
            self._count_progress()
        self._wake_up.wake()

    def end_shard(self, lease: Lease, message: ShardEnd | ShardFail) -> None:
        """Ends the lease: all of its shard was sent, or the shard cannot be run.

        Raises SessionLost when this producer does not hold the lease any more.
        """
        with self._state.changed:
            self._check(lease)
            self._state.session.leases.popleft()
            self._state.outbox.append((message, None))
            self._count_progress()
        self._wake_up.wake()

    def announce_revision(self, name: str, number: int) -> None:
        """Tells the trainer, with the next heartbeats, of the newest checkpoint of the language model."""
        with self._state.changed:
            self._state.revision = name, number

    def report_progress(self) -> None:
        """Tells the trainer, with the next heartbeat, that the loop works although no chunk is ready."""
        with self._state.changed:
            self._count_progress()

    @property
    def state(self) -> str:
        """connecting, working or idle."""
        with self._state.changed:
            if self._state.session.welcome is None:
                return "connecting"
            return "working" if self._state.session.leases else "idle"

    @property
    def sessions(self) -> int:
        """Sessions that a trainer has accepted."""
        return self._state.sessions

    def _check(self, lease: Lease) -> None:
        if self._state.is_closing or not self._state.session.holds(lease):
            raise SessionLost

    def _count_progress(self) -> None:
        self._state.progress += 1
        self.moved_at = time.monotonic()

    def _wait(self, cause: str) -> None:
        began = time.monotonic()
        self._state.changed.wait(timeout=WAIT_SECONDS)
        self.moved_at = time.monotonic()
        self.stall_seconds[cause] += self.moved_at - began
