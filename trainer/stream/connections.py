"""Who is connected to the stream, and how much ZeroMQ holds of what they sent: bounds that ZeroMQ itself has not.

ZeroMQ counts whole messages. Frames of a message whose last one never comes pile up without limit, a connection that
says nothing is kept for ever, and there is no limit to connections. So a thread here keeps a second descriptor of each
one, as the socket's monitor announces it, and looks at all of them every few milliseconds. Shutting such a descriptor
down makes ZeroMQ drop the connection, and free what it held of it.

    held   = bytes that ZeroMQ has read (TCP_INFO less what still waits in the kernel) - bytes of delivered messages
    may be = SLACK_BYTES, and for a session also the chunks it has credit for: the memory of those is the buffer's

Both sides are kept as totals since the connection began, which only grow. Pings and handshakes are read and never
delivered. They are forgiven with each delivered message: it proves that everything read before the socket was last
found empty has been delivered too. A connection without a session has HELLO_SECONDS to get one, all of them together
have PENDING_BYTES, and there are at most PENDING_CONNECTIONS: the oldest makes way.

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

import zmq
from zmq.utils.monitor import recv_monitor_message

from producer.common.logs import OutsideLog
from producer.wire import MAX_HEADER_BYTES

log = logging.getLogger("sluice.trainer")

HELLO_SECONDS = 10.0
"""A connection without a session is closed after so long."""
HELLOS_ALLOWED = 16
"""In HELLO_SECONDS, of one connection; a producer says one for each session, and each session has its connection."""
SLACK_BYTES = 2 * MAX_HEADER_BYTES
"""Of each connection, besides its chunks: a HELLO and other headers."""
PENDING_BYTES = 8 * SLACK_BYTES
"""Of all connections without a session. A frame of one byte takes 3 on the wire and 64 of memory."""
PENDING_CONNECTIONS = 128
PENDING_SECONDS, SESSION_SECONDS = 0.002, 0.02
"""Between two looks: while a connection has no session, and while each has one."""

FRAME_BYTES, LONG_FRAME_BYTES, LONG_FRAME = 2, 9, 256
"""Of a frame's header on the wire, and the length from which it is the long one (ZMTP 3.1)."""
SEAL_BYTES = 33
"""What CURVE adds to each frame: command name, nonce, authenticator and flags."""
TCP_INFO_BYTES, RECEIVED_AT = 192, 128
"""Of Linux' struct tcp_info, and where tcpi_bytes_received stands in it."""
EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(eq=False)
class Connection:
    """One connection, as both threads see it: totals of bytes, and until when it may go without a session."""

    number: int
    """ZeroMQ's descriptor."""
    descriptor: socket.socket
    """A second one; what ZeroMQ does with its own is not touched but by shutting the connection down."""
    peer: str
    counted: bool
    """Whether its bytes can be counted."""
    deadline: float | None
    """None while it holds a session."""
    delivered: int = 0
    allowed: int = SLACK_BYTES
    """As many bytes may have been read in all."""
    read: tuple[int, float] = (0, float("-inf"))
    """Bytes that ZeroMQ had read, and when that was looked at."""
    hellos: list[float] = field(default_factory=list)
    """When it said HELLO, within the last HELLO_SECONDS."""
    closed: bool = False

    @property
    def held(self) -> int:
        return max(0, self.read[0] - self.delivered)

    def brought(self, frame: zmq.Frame) -> bool:
        """Whether a frame came on this connection, or at least on none that there was beside it."""
        return _source(frame) == self.number


class Connections:
    """See the module's docstring. `start` and `stop` bracket the thread; the socket's thread calls the others."""

    def __init__(self, router: zmq.Socket, encrypted: bool) -> None:
        """Before `router` binds: no connection may come unseen."""
        self._encrypted = encrypted
        self._monitor = router.get_monitor_socket(EVENTS)
        self._address: int | str | bytes = b""
        """Of the socket: a port, a file, or a name."""
        self._table: dict[int, Connection] = {}
        """By ZeroMQ's descriptor."""
        self._lock = threading.Lock()
        """Of the monitor and the table: whichever thread needs the news first reads them."""
        self._closed: Counter[str] = Counter()
        self._failed_handshakes: Counter[int] = Counter()
        self._outside = OutsideLog(log)
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
        self._outside.flush(everything=True)
        with self._lock:
            self._monitor.close(0)
            for connection in self._table.values():
                connection.descriptor.close()
            self._table.clear()

    def of(self, frame: zmq.Frame) -> Connection | None:
        """On which connection a frame came; None when that is gone by now. For those whose connection is not known."""
        with self._lock:
            self._read_monitor()  # it was announced before it could bring anything
            number = _source(frame)
            return None if number is None else self._table.get(number)

    def deliver(self, connection: Connection, frames: Sequence[zmq.Frame], emptied: float) -> None:
        """A whole message was taken from the socket, which was last found empty at `emptied`."""
        connection.delivered += sum(map(self._wire_bytes, frames))
        read, looked = connection.read
        if looked < emptied:
            connection.delivered = max(connection.delivered, read)
        self.allow(connection, 0)

    def allow(self, connection: Connection, chunk_bytes: int) -> None:
        """So many bytes of chunks may come beyond what was delivered."""
        connection.allowed = max(connection.allowed, connection.delivered + chunk_bytes + SLACK_BYTES)

    def hear_hello(self, connection: Connection, now: float) -> bool:
        """A HELLO came; False, and the connection is closed, when that is one too many."""
        connection.hellos = [one for one in connection.hellos if now - one < HELLO_SECONDS] + [now]
        if len(connection.hellos) <= HELLOS_ALLOWED:
            return True
        with self._lock:
            self._close(connection, "hellos", f"more than {HELLOS_ALLOWED} HELLOs within {HELLO_SECONDS:g} s")
        return False

    def close(self, connection: Connection, reason: str, sentence: str) -> None:
        """Ends a connection whose messages are no use."""
        with self._lock:
            self._close(connection, reason, sentence)

    def hold_session(self, connection: Connection) -> None:
        connection.deadline = None

    def end_session(self, connection: Connection) -> None:
        """It may get another one; until then what it had credit for may still arrive."""
        if connection.deadline is None:
            connection.deadline = time.monotonic() + HELLO_SECONDS

    def news(self) -> tuple[Counter[str], Counter[int]]:
        """Since the last call: connections closed here, by reason, and failed handshakes, by ZeroMQ's event."""
        with self._lock:
            told = self._closed, self._failed_handshakes
            self._closed, self._failed_handshakes = Counter(), Counter()
        return told

    # The thread

    def _run(self) -> None:
        pause = SESSION_SECONDS
        while not self._stop.wait(pause):
            try:
                with self._lock:
                    self._read_monitor()
                    pause = PENDING_SECONDS if self._look(time.monotonic()) else SESSION_SECONDS
            except Exception:
                self._outside.exception("connections could not be looked at")
            self._outside.flush()

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            number = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._accept(number)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                if (connection := self._table.pop(number, None)) is not None:
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
            here, peer = descriptor.getsockname(), descriptor.getpeername()
        except OSError:
            descriptor.close()
            return
        tcp = isinstance(here, tuple)
        if (here[1] if tcp else here) != self._address:
            descriptor.close()
            return
        if (known := self._table.pop(number, None)) is not None:
            known.descriptor.close()
        told = f"{peer[0]}:{peer[1]}" if tcp else "a process of this machine"
        counted = tcp and sys.platform == "linux"
        self._table[number] = Connection(number, descriptor, told, counted, time.monotonic() + HELLO_SECONDS)

    def _look(self, now: float) -> bool:
        """Closes what is beyond its bounds; whether any connection has no session."""
        pending = []
        for connection in self._table.values():
            if connection.closed:
                continue
            if connection.counted:
                connection.read = (_bytes_read(connection.descriptor), now)
            if connection.read[0] > connection.allowed:
                self._close(connection, "bytes", f"{connection.held:,} bytes of it are no message yet")
            elif connection.deadline is not None and now > connection.deadline:
                self._close(connection, "no_session", f"no session within {HELLO_SECONDS:g} s")
            elif connection.deadline is not None:
                pending.append(connection)
        for connection in pending[: max(0, len(pending) - PENDING_CONNECTIONS)]:
            self._close(connection, "crowd", f"{len(pending)} connections have no session")
        if (held := sum(connection.held for connection in pending)) > PENDING_BYTES:
            largest = max(pending, key=lambda connection: connection.held)
            self._close(largest, "bytes", f"{held:,} bytes without a session are no message yet")
        return bool(pending)

    def _close(self, connection: Connection, reason: str, sentence: str) -> None:
        if connection.closed:
            return
        connection.closed = True
        self._closed[f"closed_{reason}"] += 1
        self._outside.warning("connection of %s closed: %s", connection.peer, sentence)
        with suppress(OSError):  # the other side was quicker
            connection.descriptor.shutdown(socket.SHUT_RDWR)

    def _wire_bytes(self, frame: zmq.Frame) -> int:
        length = len(frame) + (SEAL_BYTES if self._encrypted else 0)
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
