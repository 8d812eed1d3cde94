"""From chunk to buffer: a buffer for the run's stream, and chunks checked, copied into it and counted by the ledger.

A chunk is copied once, from the received frame into its slots, and before the ledger counts it, so that the two agree
whatever fails.
"""

from __future__ import annotations

from collections.abc import Callable

from producer.wire import DTYPE_BYTES, Chunk, Hello
from trainer.planning.cost import buffer_bytes
from trainer.state.format import BufferState
from trainer.stream.buffer import ShuffleBuffer
from trainer.stream.ledger.ledger import AcceptedChunk, Ledger
from trainer.stream.ledger.sessions import Send
from trainer.stream.payload import is_finite, split_payload


class NoRoomError(RuntimeError):
    """No buffer can be made for what a HELLO announces. The message is for its sender."""


class Ingest:
    """The buffer of a run, made when its stream is known. Not thread-safe: the owner locks around each call."""

    def __init__(self, ledger: Ledger, make_buffer: Callable[[Hello], ShuffleBuffer], saved: BufferState) -> None:
        """`make_buffer` may raise NoRoomError; `saved` is what a checkpoint kept of the buffer."""
        self.buffer: ShuffleBuffer | None = None
        self._ledger = ledger
        self._make_buffer = make_buffer
        self._saved = saved
        self._stream: Hello | None = None
        """The stream that the buffer was made for."""

    def prepare_buffer(self) -> None:
        """Makes a buffer for the run's stream, which may change before the first activations. Raises NoRoomError."""
        stream = self._ledger.identity.hello
        assert stream is not None
        if self._stream is stream:
            return
        self.buffer = self._stream = None  # before its successor is made: there may be no room for both
        buffer = self._make_buffer(stream)
        buffer.restore(self._saved)
        self.buffer, self._stream = buffer, stream
        self.forget_hooks()

    def forget_hooks(self) -> None:
        """Gives back the buffer's memory for hooks that the ledger no longer asks for."""
        if self.buffer is not None and self._stream is not None:
            for number, hook in enumerate(self._stream.hooks):
                if hook.name in self._ledger.shards.forgotten_hooks:
                    self.buffer.forget(number)

    def take_in(self, session: str, chunk: Chunk, data: memoryview, now: float) -> list[Send]:
        """Copies the payload of a chunk into the buffer, if the ledger accepts it.

        A chunk with NaN or infinity is rejected whole: the producer's session ends with a message that says so, its
        leases return, and the shard counts as reported broken (`failures`).
        """
        buffer = self.buffer
        assert buffer is not None
        hello = self._ledger.sessions[session].hello
        x = split_payload(hello, data, chunk.rows, chunk.hooks)
        if x is not None and not is_finite(x):
            reason = "chunk holds NaN or infinity"
            if hello.provenance.get("model_dtype") == "float16":
                reason += ", as float16 gives beyond 65504; set model.dtype to bfloat16 or float32"
            return self._ledger.reject(session, "non_finite", reason, chunk.rows, blames_shard=True)

        def insert(accepted: AcceptedChunk) -> None:
            if x is not None:
                buffer.insert(x, accepted.serial, accepted.position)

        return self._ledger.chunk(session, chunk, len(data), now, insert)[1]

    def state(self) -> BufferState:
        """The buffer's state for a checkpoint."""
        return self._saved if self.buffer is None else self.buffer.state()


def check_room(hello: Hello, rows: int, free: float) -> None:
    """Checks that a buffer of `rows` activations of this stream fits into `free` bytes. Raises NoRoomError."""
    needed = buffer_bytes(rows, [hook.width for hook in hello.hooks], DTYPE_BYTES[hello.dtype])
    if needed > free:
        widest = max(hello.hooks, key=lambda hook: hook.width)
        raise NoRoomError(
            f"hook {widest.name[:100]} has width {widest.width:,}, and the {len(hello.hooks)} hook(s) need "
            f"{needed / 1e9:,.1f} GB for buffer.rows = {rows:,}, where {free / 1e9:,.1f} GB of memory are free; "
            "lower buffer.rows, or start the trainer where there is more memory"
        )
