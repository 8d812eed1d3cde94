"""Connections to the stream, and bounds on what ZeroMQ holds of their messages, which ZeroMQ itself has not.

ZeroMQ counts whole messages. Frames of a message whose last one never comes pile up without limit, a connection that
says nothing is kept for ever, and there is no limit to connections. So a thread here keeps a second descriptor of each
one, as the socket's monitor announces it, and looks at all of them every few milliseconds. Shutting such a descriptor
down makes ZeroMQ drop the connection, and free what it held of it.

    held    = bytes that ZeroMQ has read (TCP_INFO less what still waits in the kernel) - bytes of delivered messages
    allowed = SLACK_BYTES, and for a session also the chunks it has credit for: the memory of those is the buffer's

Both sides are kept as totals since the connection began, which only grow. Pings and handshakes are read and never
delivered. They are forgiven with each delivered message: it proves that everything read before the socket was last
found empty has been delivered too. A connection without a session is *pending*. `ConnectionLimits` bounds how long one
may be, how many may be, and all of them together have PENDING_BYTES: the oldest is closed first.

Bytes are counted of TCP on Linux. Of ipc they cannot be: only processes that may write to the socket's file, by default
those of the same user, can connect there. Time and number are bounded for them as well.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import socket
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from producer.common.logs import OutsideLog
from producer.wire import MAX_HEADER_BYTES

log = logging.getLogger("sluice.trainer")

SLACK_BYTES = 2 * MAX_HEADER_BYTES
"""Bytes that each connection may hold besides its chunks: a HELLO and other headers."""
PENDING_BYTES = 8 * SLACK_BYTES
"""Bytes that all pending connections may hold together. A frame of one byte takes 3 on the wire and 64 of memory."""
PENDING_SECONDS, SESSION_SECONDS = 0.002, 0.02
"""Between two looks: while a connection is pending, and while each has a session."""

FRAME_BYTES, LONG_FRAME_BYTES, LONG_FRAME = 2, 9, 256
"""Bytes of a short and a long frame header on the wire, and the frame length from which it is long (ZMTP 3.1)."""
SEAL_BYTES = 33
"""Bytes that CURVE adds to each frame: command name, nonce, authenticator and flags."""
TCP_INFO_BYTES, RECEIVED_AT = 192, 128
"""Size of Linux' struct tcp_info, and the offset of tcpi_bytes_received in it."""
EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds on connections without a session."""

    pending_seconds: float = 10.0
    """A connection without a session is closed after so long."""
    pending: int = 128
    """Connections without a session."""
    hellos: int = 16
    """HELLOs of one connection in `pending_seconds`; a producer sends one per session, on a connection of its own."""


class Reading(NamedTuple):
    """One look at a connection. It is replaced as a whole, since two threads see it."""

    total: int
    """Bytes that ZeroMQ had read since the connection began."""
    at: float


UNREAD = Reading(0, float("-inf"))


@dataclass(eq=False)
class Connection:
    """One connection, as both threads see it: totals of bytes, and until when it may go without a session."""

    number: int
    """ZeroMQ's descriptor."""
    descriptor: socket.socket
    """A second one; what ZeroMQ does with its own is not touched but by shutting the connection down."""
    peer: str
    has_byte_count: bool
    """Whether its bytes can be counted."""
    deadline: float | None
    """When it must have a session; None while it has one."""
    delivered_bytes: int = 0
    allowed_bytes: int = SLACK_BYTES
    """Total of bytes that may have been read."""
    reading: Reading = UNREAD
    hello_times: list[float] = field(default_factory=list)
    """When it said HELLO, within the last `pending_seconds`."""
    is_closed: bool = False

    @property
    def held_bytes(self) -> int:
        return max(0, self.reading.total - self.delivered_bytes)

    def is_source_of(self, frame: zmq.Frame) -> bool:
        """Whether a frame came on this connection, or at least on none that there was beside it."""
        return _source(frame) == self.number


class Connections:
    """See the module's docstring. `start` and `stop` bracket the thread; the socket's thread calls the others."""

    def __init__(self, router: zmq.Socket, is_encrypted: bool, limits: ConnectionLimits) -> None:
        """To be made before `router` binds: no connection may come unseen."""
        self._is_encrypted = is_encrypted
        self._limits = limits
        self._monitor = router.get_monitor_socket(EVENTS)
        self._address: int | str | bytes = b""
        """Address of the socket: a port, a file, or a name."""
        self._connections: dict[int, Connection] = {}
        """Connections by ZeroMQ's descriptor, in the order in which they came."""
        self._lock = threading.Lock()
        """Guards the socket's monitor and the connections: whichever thread needs the events first reads them."""
        self._closures: Counter[str] = Counter()
        self._failed_handshakes: Counter[int] = Counter()
        self._outside_log = OutsideLog(log)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def start(self, endpoint: str) -> None:
        """`endpoint` is what the socket is bound to."""
        kind, _, address = endpoint.partition("://")
        abstract = address.startswith("@")  # an ipc address without a file
        self._address = b"\0" + address[1:].encode() if abstract else address
        if kind == "tcp":
            self._address = int(address.rpartition(":")[2])
        self._thread.start()

    def stop(self) -> None:
        """Lets go of everything but the connections themselves, which are their socket's."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._outside_log.flush(everything=True)
        with self._lock:
            self._monitor.close(0)
            for connection in self._connections.values():
                connection.descriptor.close()
            self._connections.clear()

    def find(self, frame: zmq.Frame) -> Connection | None:
        """The connection that a frame came on; None when it is gone by now."""
        with self._lock:
            self._read_monitor()  # it was announced before it could bring anything
            number = _source(frame)
            return None if number is None else self._connections.get(number)

    def count_delivery(self, connection: Connection, frames: Sequence[zmq.Frame], empty_at: float) -> None:
        """A whole message was taken from the socket, which was last found empty at `empty_at`."""
        connection.delivered_bytes += sum(map(self._wire_bytes, frames))
        reading = connection.reading
        if reading.at < empty_at:
            connection.delivered_bytes = max(connection.delivered_bytes, reading.total)
        self.allow(connection, 0)

    def allow(self, connection: Connection, chunk_bytes: int) -> None:
        """Lets so many bytes of chunks come beyond what was delivered."""
        allowed = connection.delivered_bytes + chunk_bytes + SLACK_BYTES
        connection.allowed_bytes = max(connection.allowed_bytes, allowed)

    def admit_hello(self, connection: Connection, now: float) -> bool:
        """Counts a HELLO; False, and the connection is closed, when that is one too many."""
        limits = self._limits
        recent = [at for at in connection.hello_times if now - at < limits.pending_seconds]
        connection.hello_times = [*recent, now]
        if len(connection.hello_times) <= limits.hellos:
            return True
        reason = f"more than {limits.hellos} HELLOs within {limits.pending_seconds:g} s"
        self.close(connection, "hellos", reason)
        return False

    def close(self, connection: Connection, code: str, reason: str) -> None:
        """Ends a connection, and counts it under `code`."""
        with self._lock:
            self._close(connection, code, reason)

    def hold_session(self, connection: Connection) -> None:
        """The connection has a session, and may last."""
        connection.deadline = None

    def end_session(self, connection: Connection) -> None:
        """The connection is pending again; what its session had credit for may still arrive."""
        if connection.deadline is None:
            connection.deadline = time.monotonic() + self._limits.pending_seconds

    def pop_events(self) -> tuple[Counter[str], Counter[int]]:
        """Events since the last call: connections closed here, by code, and failed handshakes, by ZeroMQ's event."""
        with self._lock:
            events = self._closures, self._failed_handshakes
            self._closures, self._failed_handshakes = Counter(), Counter()
        return events

    # The thread

    def _run(self) -> None:
        pause = SESSION_SECONDS
        while not self._stop.wait(pause):
            try:
                with self._lock:
                    self._read_monitor()
                    pause = PENDING_SECONDS if self._enforce_limits(time.monotonic()) else SESSION_SECONDS
            except Exception:
                self._outside_log.exception("connections could not be checked")
            self._outside_log.flush()

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            number = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._accept(number)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                if (connection := self._connections.pop(number, None)) is not None:
                    connection.descriptor.close()
            else:
                self._failed_handshakes[int(event["event"])] += 1

    def _accept(self, number: int) -> None:
        """Keeps a second descriptor, unless the number is another file's by now: the connection was short."""
        try:
            descriptor = _duplicate(number)
        except OSError:
            return
        try:
            own, other = descriptor.getsockname(), descriptor.getpeername()
        except OSError:
            descriptor.close()
            return
        is_tcp = isinstance(own, tuple)
        if (own[1] if is_tcp else own) != self._address:
            descriptor.close()
            return
        if (earlier := self._connections.pop(number, None)) is not None:
            earlier.descriptor.close()
        peer = f"{other[0]}:{other[1]}" if is_tcp else "a process of this machine"
        has_byte_count = is_tcp and sys.platform == "linux"
        deadline = time.monotonic() + self._limits.pending_seconds
        self._connections[number] = Connection(number, descriptor, peer, has_byte_count, deadline)

    def _enforce_limits(self, now: float) -> bool:
        """Closes connections that are beyond their bounds; whether any is pending."""
        pending = []
        for connection in self._connections.values():
            if connection.is_closed:
                continue
            if connection.has_byte_count:
                connection.reading = Reading(_bytes_read(connection.descriptor), now)
            if connection.reading.total > connection.allowed_bytes:
                self._close(connection, "bytes", f"{connection.held_bytes:,} bytes of it are no message yet")
            elif connection.deadline is not None and now > connection.deadline:
                self._close(connection, "no_session", f"no session within {self._limits.pending_seconds:g} s")
            elif connection.deadline is not None:
                pending.append(connection)
        for connection in pending[: max(0, len(pending) - self._limits.pending)]:
            self._close(connection, "crowd", f"{len(pending)} connections have no session")
        if (held := sum(connection.held_bytes for connection in pending)) > PENDING_BYTES:
            largest = max(pending, key=lambda connection: connection.held_bytes)
            self._close(largest, "bytes", f"{held:,} bytes without a session are no message yet")
        return bool(pending)

    def _close(self, connection: Connection, code: str, reason: str) -> None:
        if connection.is_closed:
            return
        connection.is_closed = True
        self._closures[f"closed_{code}"] += 1
        self._outside_log.warning("connection of %s closed: %s", connection.peer, reason)
        with suppress(OSError):  # the other side was quicker
            connection.descriptor.shutdown(socket.SHUT_RDWR)

    def _wire_bytes(self, frame: zmq.Frame) -> int:
        length = len(frame) + (SEAL_BYTES if self._is_encrypted else 0)
        return length + (FRAME_BYTES if length < LONG_FRAME else LONG_FRAME_BYTES)


def _source(frame: zmq.Frame) -> int | None:
    """ZeroMQ's descriptor of the connection that a frame came on; None for peers of ZMTP before version 3."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


def _duplicate(number: int) -> socket.socket:
    """A socket that shares the connection of descriptor `number`. Raises OSError when that is no socket."""
    copy = os.dup(number)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _bytes_read(connection: socket.socket) -> int:
    """How many bytes were taken out of the kernel since the connection began; at a moment's delay, never too many."""
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    waiting = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, waiting)
    (received,) = struct.unpack_from("Q", information, RECEIVED_AT)
    return int(received) - waiting[0]
