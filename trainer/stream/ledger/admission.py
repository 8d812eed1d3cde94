"""Admission: the reasons for which a producer that says hello cannot serve this run."""

from __future__ import annotations

from collections.abc import Mapping

from producer.wire import MAX_CHUNK_BYTES, TARGET_CHUNK_BYTES, Hello, Reject
from trainer.stream.ledger.identity import StreamIdentity
from trainer.stream.ledger.sessions import Session, activation_bytes

MAX_SESSIONS = 256
"""A tick looks at each of them; further producers are asked to come again."""


def admission_fault(
    hello: Hello, identity: StreamIdentity, sessions: Mapping[str, Session], capacity: int
) -> Reject | None:
    """The refusal of a producer whose stream, chunks or number do not fit a buffer of `capacity` tokens."""
    if reject := identity.mismatch(hello, has_sessions=bool(sessions)) or _chunk_size_fault(hello, capacity):
        return reject
    if len(sessions) >= MAX_SESSIONS:
        reason = f"{len(sessions)} producers are at work, and there is room for no more"
        return Reject(code="full", reason=reason, retry=True)
    return None


def _chunk_size_fault(hello: Hello, capacity: int) -> Reject | None:
    """The refusal of a producer whose chunks are too large for a message, or for a buffer of `capacity` tokens."""
    width = activation_bytes(hello)
    if hello.chunk_rows * width > MAX_CHUNK_BYTES:
        reason = (
            f"chunks of {hello.chunk_rows} activations × {width} bytes exceed {MAX_CHUNK_BYTES} bytes; "
            "lower corpus.context, or stream fewer hooks"
        )
        return Reject(code="chunk", reason=reason, retry=False)
    if 4 * hello.chunk_rows > capacity:
        # A shorter context makes a chunk smaller only where the chunk is one long window.
        would_help = hello.chunk_rows == hello.context and 4 * (TARGET_CHUNK_BYTES // width) <= capacity
        reason = (
            f"buffer.rows = {capacity} holds fewer than four chunks of {hello.chunk_rows} activations; "
            f"raise buffer.rows to {4 * hello.chunk_rows}{', or lower corpus.context' if would_help else ''}"
        )
        return Reject(code="buffer", reason=reason, retry=False)
    return None
