"""One session with a trainer: its terms, its leases and its credit. No socket, no clock and no lock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from producer.wire import Chunk, Lease, Welcome

Payload = bytes | memoryview


@dataclass(frozen=True)
class PackedChunk:
    """The activations of a few windows of one shard, ready to be sent as a CHUNK message."""

    first_window: int
    windows: int
    rows: int
    """Activations in the payload."""
    kept_bits: bytes
    """One bit per position: which activations the payload holds."""
    outlier_bits: bytes
    """Empty, or one bit per position: which activations are dropped for their norm."""
    outlier_count: int
    payload: Payload
    """Not to be written to once the chunk is sent."""
    hooks: tuple[int, ...] = ()
    """Numbers of the hooks in the payload; empty for all."""


@dataclass(eq=False)
class ProducerSession:
    """The producer's view of one session. Times are seconds of `time.monotonic`."""

    name: str
    received_at: float
    """When the last message came; when the session began, before the first one."""
    welcome: Welcome | None = None
    """The terms; None until the trainer has accepted the HELLO."""
    hello_sent_at: float | None = None
    """When the socket took the HELLO; None while no trainer is connected."""
    heartbeat_sent_at: float = 0.0
    leases: deque[tuple[Lease, bytes]] = field(default_factory=deque)
    """Each with its mask, in the order in which the trainer granted them. The loop works on the first."""
    credit: int = 0
    """The highest chunk number that may be sent."""
    chunks_sent: int = 0

    @property
    def has_credit(self) -> bool:
        return self.chunks_sent < self.credit

    def grant(self, credit: int) -> None:
        """Raises the credit; one that is lower comes late and changes nothing."""
        self.credit = max(self.credit, credit)

    def holds(self, lease: Lease) -> bool:
        """Whether `lease` is the one to work on."""
        return bool(self.leases) and self.leases[0][0] is lease

    def number_chunk(self, lease: Lease, chunk: PackedChunk) -> Chunk:
        """Spends one credit on `chunk`: its header, with the next number."""
        assert self.welcome is not None
        self.chunks_sent += 1
        return Chunk(
            number=self.chunks_sent,
            incarnation=self.welcome.incarnation,
            shard=lease.shard,
            epoch=lease.epoch,
            attempt=lease.attempt,
            first_window=chunk.first_window,
            windows=chunk.windows,
            rows=chunk.rows,
            kept=chunk.kept_bits,
            outliers=chunk.outlier_bits,
            hooks=list(chunk.hooks),
        )

    def is_heartbeat_due(self, now: float) -> bool:
        return self.welcome is not None and now - self.heartbeat_sent_at >= self.welcome.heartbeat_seconds

    def is_silent(self, now: float) -> bool:
        """Whether the trainer that welcomed this producer has sent nothing for its dead_seconds."""
        return self.welcome is not None and now - self.received_at > self.welcome.dead_seconds
