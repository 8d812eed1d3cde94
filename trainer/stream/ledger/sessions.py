"""Sessions: one producer's conversation with this trainer, and the checks of what it sends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from producer.wire import (
    DTYPE_BYTES,
    Chunk,
    Hello,
    Message,
    ShardEnd,
    ShardFail,
    unpack_bits,
)
from trainer.stream.ledger.shards import MAX_POSITIONS, OpenShard, count_bits


@dataclass(frozen=True)
class Send:
    """A message for one session; `payload` is the raw frame behind the header, when the kind has one."""

    session: str
    message: Message
    payload: bytes | None = None


@dataclass(frozen=True)
class Fault:
    """The reason for which a session ends: a code, under which it is counted, and a sentence for the producer."""

    code: str
    reason: str


@dataclass
class Session:
    """One producer's conversation with this trainer. Chunks are counted since the session began."""

    hello: Hello
    last_heard: float
    last_progress: float
    progress: int = 0
    """The producer's own count, from its heartbeats."""
    granted: int = 0
    """Number of the last chunk that it may send."""
    received: int = 0
    announced_credit: int = 0
    """The last value of `granted` that was sent to it."""
    last_grant: int = 0
    """Number of its newest grant among the grants of all sessions; the smallest is served first."""
    last_heartbeat: float = float("-inf")
    leases: list[OpenShard] = field(default_factory=list)
    """The shard being worked on, then the waiting ones."""

    @property
    def chunks_in_flight(self) -> int:
        """Chunks that were granted and have not arrived."""
        return self.granted - self.received

    @property
    def credit_tokens(self) -> int:
        """Tokens that it may still send."""
        return self.chunks_in_flight * self.hello.chunk_rows

    def lease_of(self, message: Chunk | ShardEnd | ShardFail) -> OpenShard | None:
        """The lease under which a message was sent; None when it is not, or no longer, this session's."""
        return next((shard for shard in self.leases if shard.is_meant_by(message)), None)

    def release(self, shard: OpenShard) -> None:
        """Gives a lease back."""
        self.leases.remove(shard)
        shard.release()

    def release_all(self) -> OpenShard | None:
        """Gives every lease back; returns the shard being worked on."""
        current = self.leases[0] if self.leases else None
        for shard in list(self.leases):
            self.release(shard)
        return current

    def hear_heartbeat(self, progress: int, now: float) -> None:
        """The producer lives; its own count of progress is `progress`."""
        self.last_heard = now
        if progress > self.progress:
            self.progress, self.last_progress = progress, now

    def has_stalled(self, now: float, stall_seconds: float) -> bool:
        """Whether it has had work and credit for `stall_seconds`, and made no progress."""
        return bool(self.leases) and self.chunks_in_flight > 0 and now - self.last_progress > stall_seconds

    def hooks_wanted(self, forgotten: Collection[str]) -> list[int]:
        """Numbers of the hooks that a lease asks for; empty for all."""
        hooks = self.hello.hooks
        wanted = [number for number, hook in enumerate(hooks) if hook.name not in forgotten]
        return [] if len(wanted) == len(hooks) else wanted

    def chunk_fault(
        self, chunk: Chunk, payload_bytes: int, incarnation: str, forgotten: Collection[str] = ()
    ) -> Fault | None:
        """The fault of a chunk, checked without its lease; None for a sound one. `forgotten` hooks may be missing."""
        positions = chunk.windows * self.hello.context
        if fault := self._hooks_fault(chunk, forgotten):
            return fault
        width = activation_bytes(self.hello, chunk.hooks)
        if chunk.incarnation != incarnation:
            return Fault("incarnation", "chunk is meant for an earlier start of this trainer")
        if chunk.number != self.received + 1:
            return Fault("gap", f"chunk {chunk.number} arrived where {self.received + 1} was due")
        if chunk.number > self.granted:
            return Fault("credit", f"chunk {chunk.number} is beyond the credit of {self.granted}")
        if chunk.rows > self.hello.chunk_rows:
            return Fault("shape", f"chunk of {chunk.rows} activations; HELLO announced {self.hello.chunk_rows} at most")
        if chunk.first_window * self.hello.context + positions > MAX_POSITIONS:
            return Fault(
                "shape", f"window {chunk.first_window} lies beyond the {MAX_POSITIONS} positions a shard may have"
            )
        if len(chunk.kept) != -(-positions // 8) or len(chunk.outliers) not in (0, len(chunk.kept)):
            sizes = f"{len(chunk.kept)} and {len(chunk.outliers)}"
            return Fault("shape", f"masks of {sizes} bytes for {positions} positions")
        if (rows := count_bits(unpack_bits(chunk.kept, positions))) != chunk.rows:
            return Fault("shape", f"chunk names {rows} activations and announces {chunk.rows}")
        if payload_bytes != chunk.rows * width:
            return Fault("shape", f"payload of {payload_bytes} bytes where {chunk.rows} activations × {width} were due")
        return None

    def _hooks_fault(self, chunk: Chunk, forgotten: Collection[str]) -> Fault | None:
        if not chunk.hooks:
            return None
        hooks, numbers = self.hello.hooks, chunk.hooks
        if numbers != sorted(set(numbers)) or numbers[-1] >= len(hooks):
            return Fault("shape", f"chunk of hooks {str(numbers)[:100]}; HELLO has {len(hooks)}")
        if missing := set(self.hooks_wanted(forgotten) or range(len(hooks))) - set(numbers):
            return Fault("shape", f"chunk lacks hook {hooks[min(missing)].name[:100]}, which its lease asks for")
        return None


def activation_bytes(hello: Hello, hooks: Sequence[int] = ()) -> int:
    """Bytes of one token on the wire: its activations at these hooks, by number, or at every hook."""
    widths = [hook.width for hook in hello.hooks]
    return DTYPE_BYTES[hello.dtype] * sum([widths[number] for number in hooks] if hooks else widths)
