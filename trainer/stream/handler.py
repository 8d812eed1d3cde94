"""Handles each message from the socket: identifies its sender, passes it to the ledger, and returns the answers.

A connection holds one session. No message may raise out of here for a fault of its sender; a fault of ours ends the
session that the message came from.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import zmq

from producer.common.logs import OutsideLog
from producer.keys import Clients
from producer.wire import (
    Bye,
    Chunk,
    Heartbeat,
    Hello,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    WireError,
    decode,
)
from trainer.stream.connections import Connection, Connections
from trainer.stream.ingest import Ingest, NoRoomError
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.sessions import Send
from trainer.stream.router import MOST_FRAMES, RawMessage
from trainer.stream.routes import Peer, Routes

log = logging.getLogger("sluice.trainer")

FRAMES_TOLERATED = 64
"""A message of more takes so long to receive that its connection is closed."""
INTERNAL = "the trainer could not handle a message of this session; its log says why"
KEY_WITHDRAWN = Reject(code="key", reason="its key was withdrawn from the trainer's clients folder", retry=False)


@dataclass
class MessageHandler:
    """Takes messages to the ledger and the buffer, under `lock`."""

    ledger: Ledger
    ingest: Ingest
    routes: Routes
    connections: Connections
    clients: Clients | None
    lock: threading.RLock
    outside_log: OutsideLog

    def handle(self, raw: RawMessage, empty_at: float) -> list[Send]:
        """The answers to a message; the socket was last found empty at `empty_at`."""
        session, connection = self._identify(raw)
        if connection is not None:
            self.connections.count_delivery(connection, raw.frames, empty_at)
        try:
            message = self._decode(raw, connection)
        except WireError as error:
            log.debug("message dropped: %s", error)
            with self.lock:
                self.ledger.errors[error.kind] += 1
                if error.kind == "version" and session is None:
                    reason = f"{error}; run one release on both sides"
                    return self._reject_unknown_peer(raw.route, "version", reason, retry=False)
            return []
        now = time.monotonic()
        with self.lock:
            if isinstance(message, Hello):
                if connection is not None and not self.connections.admit_hello(connection, now):
                    return []
                return self._hello(raw, message, now, connection)
            if session is None or session not in self.ledger.sessions:
                return self._unknown_session(raw.route, message)
            return self._message(session, message, raw.frames, now)

    def fail(self, what: str, route: bytes | None = None) -> list[Send]:
        """Logs and counts an exception of ours, and ends the session that it came from, if any."""
        self.outside_log.exception("%s could not be handled, please report it", what)
        with self.lock:
            session = None if route is None else self.routes.session_at(route)
            if session in self.ledger.sessions:
                return self.ledger.reject(session, "internal", INTERNAL)
            self.ledger.errors["internal"] += 1
            return [] if route is None else self._reject_unknown_peer(route, "internal", INTERNAL, retry=True)

    def end_withdrawn(self) -> list[Send]:
        """Ends the sessions whose key is no longer in the clients folder."""
        with self.lock:
            sessions = self.ledger.sessions
            withdrawn = [
                session
                for session, key in self.routes.session_keys()
                if session in sessions and self.clients is not None and not self.clients.allows(key)
            ]
            log.info("keys were read again: %d of %d sessions end", len(withdrawn), len(sessions))
            for session in withdrawn:
                self.ledger.bye(session, Bye(), time.monotonic())
        return [Send(session, KEY_WITHDRAWN) for session in withdrawn]

    def _identify(self, raw: RawMessage) -> tuple[str | None, Connection | None]:
        """The session and the connection that a message came from, where there are any."""
        session = self.routes.session_at(raw.route)
        peer = self.routes.peer(session)
        if session is not None and peer is not None and peer.connection is not None:
            if peer.connection.is_source_of(raw.frames[0]):
                return session, peer.connection
            with self.lock:
                self.ledger.disconnect(session)  # another connection has taken this one's identity
            self.routes.remove(session)
            session = None
        return session, self.connections.find(raw.frames[0])

    def _decode(self, raw: RawMessage, connection: Connection | None) -> Message:
        if not 1 <= raw.count <= MOST_FRAMES:
            if connection is not None and raw.count > FRAMES_TOLERATED:
                self.connections.close(connection, "frames", f"a message of {raw.count:,} frames")
            raise WireError("frames", f"message of {raw.count} frames")
        return decode(raw.frames[0].buffer)

    def _message(self, session: str, message: Message, frames: list[zmq.Frame], now: float) -> list[Send]:
        """The answers to a message of a current session."""
        if isinstance(message, Chunk):
            data = frames[1].buffer if len(frames) == 2 else memoryview(b"")
            return self.ingest.take_in(session, message, data, now)
        if isinstance(message, ShardEnd):
            return self.ledger.shard_end(session, message, now)
        if isinstance(message, ShardFail):
            self.outside_log.warning("shard %d failed: %s", message.shard, message.error)
            return self.ledger.shard_fail(session, message, now)
        if isinstance(message, Heartbeat):
            return self.ledger.heartbeat(session, message, now)
        if isinstance(message, Bye):
            return self.ledger.bye(session, message, now)
        self.ledger.errors["direction"] += 1
        return []

    def _hello(self, raw: RawMessage, hello: Hello, now: float, connection: Connection | None) -> list[Send]:
        """The answers to a HELLO; a session that was at the same route ends."""
        earlier = self.routes.session_at(raw.route)
        if earlier != hello.session and earlier in self.ledger.sessions:
            self.ledger.bye(earlier, Bye(), now)
        key = str(raw.frames[0].get("User-Id")).encode() if self.clients is not None else None
        self.routes.add(hello.session, Peer(raw.route, connection, key))
        if self.clients is not None and key is not None and not self.clients.allows(key):
            return [Send(hello.session, KEY_WITHDRAWN)]  # the connection is older than its key's withdrawal
        sends = self.ledger.hello(hello, now)
        if hello.session in self.ledger.sessions:
            try:
                self.ingest.prepare_buffer()
            except NoRoomError as error:
                sends = self.ledger.reject(hello.session, "memory", str(error), retry=False)
            else:
                self.outside_log.info("producer %s joins (%d at work)", hello.name, len(self.ledger.sessions))
                if connection is not None:
                    self.connections.hold_session(connection)
        for send in sends:
            if isinstance(send.message, Reject):
                address = connection.peer if connection is not None else "a connection that is gone"
                self.outside_log.warning("producer %s of %s refused: %s", hello.name, address, send.message.reason)
        return sends

    def _unknown_session(self, route: bytes, message: Message) -> list[Send]:
        """The answer to a session that has ended, or that began under an earlier start of this trainer."""
        self.ledger.errors["unknown_session"] += 1
        if isinstance(message, Chunk):
            self.ledger.rejected["unknown_session"] += message.rows
        reason = "this session has ended; start a new one"
        return self._reject_unknown_peer(route, "unknown_session", reason, retry=True)

    def _reject_unknown_peer(self, route: bytes, code: str, reason: str, retry: bool) -> list[Send]:
        """A REJECT for a peer without a session."""
        return [Send(self.routes.add_unknown_peer(route), Reject(code=code, reason=reason, retry=retry))]
