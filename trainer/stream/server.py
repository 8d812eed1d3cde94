"""The socket's thread: receives messages, lets the ledger's clock tick, and sends what the ledger says.

No message ends the thread: what goes wrong while one is handled ends the session that it came from, with REJECT and the
code `internal`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import zmq

from producer.common.logs import OutsideLog
from producer.settings import StreamSettings
from producer.wire import MAX_HEADER_BYTES, Credit, encode
from trainer.stream.connections import ConnectionLimits
from trainer.stream.handler import MessageHandler
from trainer.stream.ingest import Ingest
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.sessions import Send, activation_bytes
from trainer.stream.router import RouterSocket
from trainer.stream.routes import Routes

log = logging.getLogger("sluice.trainer")

POLL_MILLISECONDS = 5
RECEIVE_SECONDS = 0.02
"""Messages are received for about this long before the ledger's clock ticks again."""
RECEIVE_MESSAGES = 32
"""And so many of them."""
EVENT_SECONDS = 0.2
"""Between two looks at failed handshakes and closed connections."""


class StreamServer:
    """The thread and its socket. Ledger and buffer are used under `lock`, the socket by the thread alone."""

    def __init__(
        self,
        settings: StreamSettings,
        ledger: Ledger,
        ingest: Ingest,
        lock: threading.RLock,
        on_tick: Callable[[], None],
        limits: ConnectionLimits,
    ) -> None:
        """`on_tick` is called, with the lock held, after each tick of the ledger."""
        self.outside_log = OutsideLog(log)
        self.failure: BaseException | None = None
        """The exception that has ended the thread."""
        self.outbox: list[Send] = []
        """Messages of other threads, to be sent with the next tick."""
        self.keys_changed = threading.Event()
        """The folder of keys is to be read again."""
        self._router = RouterSocket(settings, limits)
        self.endpoint = self._router.endpoint
        self._ledger = ledger
        self._lock = lock
        self._on_tick = on_tick
        self._dead_seconds = settings.dead_seconds
        self._routes = Routes(self._router.connections)
        self._unreachable: dict[str, float] = {}
        """Sessions that a message could not be sent to, and since when. What they sent may still wait in the socket."""
        self._handler = MessageHandler(
            ledger, ingest, self._routes, self._router.connections, self._router.clients, lock, self.outside_log
        )
        self._stop = threading.Event()
        self._tick_at = time.monotonic()
        """When the ledger's clock last ticked without a fault."""
        self._events_at = 0.0
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        """Lets producers in."""
        self._router.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and closes the socket."""
        self._stop.set()
        self._thread.join()
        self._router.terminate()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._router.poll(POLL_MILLISECONDS):
                    self._receive()
                try:
                    self._tick()
                    self._tick_at = time.monotonic()
                except Exception:
                    # Without its clock the ledger serves nobody: a fault that lasts must be seen.
                    if time.monotonic() - self._tick_at > self._dead_seconds:
                        raise
                    self._handler.fail("the ledger's clock")
        except BaseException as error:
            self.failure = error
            log.exception("the stream's thread failed")
        finally:
            self._router.close()
            self.outside_log.flush(everything=True)

    def _receive(self) -> None:
        """Handles what has arrived, up to bounds, so that credit and heartbeats are never long in coming."""
        deadline = time.monotonic() + RECEIVE_SECONDS
        for _ in range(RECEIVE_MESSAGES):
            if (raw := self._router.receive()) is None:
                return
            try:
                sends = self._handler.handle(raw, self._router.empty_at)
            except Exception:
                sends = self._handler.fail("a message", raw.route)
            self._send(sends)
            if time.monotonic() > deadline:
                return

    def _tick(self) -> None:
        """The regular work of the thread, whether or not a message came."""
        self._count_connection_events()
        if self.keys_changed.is_set():
            self.keys_changed.clear()
            self._send(self._handler.end_withdrawn())
        with self._lock:
            self._disconnect_unreachable()
            sends, self.outbox = self.outbox + self._ledger.tick(time.monotonic()), []
            self._on_tick()
        self._send(sends)
        self._routes.keep_only(self._ledger.sessions.keys())
        self.outside_log.flush()
        if self._router.clients is not None:
            self._router.clients.outside.flush()

    def _disconnect_unreachable(self) -> None:
        """Ends the sessions that cannot be reached, once all that they sent is handled: it may end with a BYE."""
        for session, since in list(self._unreachable.items()):
            if since < self._router.empty_at:
                del self._unreachable[session]
                self._ledger.disconnect(session)

    def _count_connection_events(self) -> None:
        """Counts the connections that were closed, and those that were turned away for their keys."""
        if time.monotonic() < self._events_at:
            return
        self._events_at = time.monotonic() + EVENT_SECONDS
        closed, failed = self._router.connections.pop_events()
        if self._router.clients is None:
            # A producer without keys may see first that the two do not fit, and hang up.
            failed.pop(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, None)
        with self._lock:
            earlier = self._ledger.auth_failures
            self._ledger.errors.update(closed)
            self._ledger.auth_failures = failures = earlier + failed.total()
        # An unknown key is logged where it is looked up, in producer.keys.
        failed.pop(zmq.EVENT_HANDSHAKE_FAILED_AUTH, None)
        if failed and (earlier == 0 or earlier // 100 < failures // 100):
            self.outside_log.warning(
                "somebody was turned away at %s, or hung up, %d times by now: stream.keys must be set on both "
                "sides or on neither, and the producer's server.key must be this trainer's",
                self.endpoint, failures,
            )  # fmt: skip

    def _send(self, sends: list[Send]) -> None:
        """Sends messages; sessions that cannot be reached are lost, see `_disconnect_unreachable`."""
        for send in sends:
            if (peer := self._routes.peer(send.session)) is None:
                continue
            try:
                if isinstance(send.message, Credit):
                    self._allow_chunks(send.session)
                is_sent = self._router.send(peer.route, encode(send.message), send.payload)
            except Exception:
                self._handler.fail("an answer")
                is_sent = False
            if not is_sent:
                self._unreachable.setdefault(send.session, time.monotonic())

    def _allow_chunks(self, name: str) -> None:
        """The connection of a session may hold the chunks that the session has credit for."""
        peer, session = self._routes.peer(name), self._ledger.sessions.get(name)
        if peer is not None and peer.connection is not None and session is not None:
            headers = session.chunks_in_flight * MAX_HEADER_BYTES
            chunk_bytes = session.credit_tokens * activation_bytes(session.hello) + headers
            self._router.connections.allow(peer.connection, chunk_bytes)
