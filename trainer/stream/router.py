"""The trainer's socket: one ROUTER, bound to the stream's endpoint, with the workarounds that libzmq needs."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator

from producer.common.addresses import is_ipv6
from producer.common.toml import show_value
from producer.keys import Clients, serve_encrypted
from producer.settings import StreamSettings
from producer.wire import MAX_CHUNK_BYTES
from trainer.stream.connections import ConnectionLimits, Connections

MOST_FRAMES = 2
"""Frames of the longest message: its header, and for some kinds one frame of data."""


class IntakeError(RuntimeError):
    """The stream cannot be opened, or a run cannot go on with it. The message is for the operator."""


@dataclass(frozen=True)
class RawMessage:
    """A message as it came from the socket."""

    route: bytes
    """ZeroMQ's identity of the sender."""
    frames: list[zmq.Frame]
    """The first MOST_FRAMES frames behind the route."""
    count: int
    """How many frames there were."""


class RouterSocket:
    """The bound socket. `start` and `close` belong to its thread; nothing but `start` may be called before it."""

    def __init__(self, settings: StreamSettings, limits: ConnectionLimits) -> None:
        """Raises IntakeError when the endpoint cannot be bound, and KeysError for keys that cannot be used."""
        self.clients: Clients | None = None
        """The producers that may connect, where the stream is encrypted."""
        self.empty_at = float("-inf")
        """When the socket was last found empty."""
        self._authenticator: ThreadAuthenticator | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.connections = Connections(self._socket, settings.keys is not None, limits)
        try:
            self._bind(settings)
        except BaseException:
            self.close()
            self.terminate()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def start(self) -> None:
        """Begins to watch the connections."""
        self.connections.start(self.endpoint)

    def close(self) -> None:
        """Closes the socket and its connections."""
        self._socket.disable_monitor()
        self.connections.stop()
        self._socket.close()

    def terminate(self) -> None:
        """Waits until what was sent has left, and ends ZeroMQ's threads; after `close`."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def poll(self, milliseconds: int) -> bool:
        """Waits until a message is here, for at most so long."""
        if self._socket.poll(milliseconds):
            return True
        self.empty_at = time.monotonic()
        return False

    def receive(self) -> RawMessage | None:
        """The next message; None when none is here."""
        try:
            frame = route = self._socket.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            self.empty_at = time.monotonic()
            return None
        frames: list[zmq.Frame] = []
        count = 0
        while frame.more:
            frame = self._socket.recv(copy=False)
            count += 1
            if count <= MOST_FRAMES:
                frames.append(frame)
        return RawMessage(route.bytes, frames, count)

    def send(self, route: bytes, header: bytes, payload: bytes | None) -> bool:
        """Sends a message without waiting; False when the peer is gone or takes nothing."""
        try:
            self._socket.send_multipart([route, header] + ([payload] if payload is not None else []), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def _bind(self, settings: StreamSettings) -> None:
        socket = self._socket
        socket.linger = 500
        socket.router_mandatory = 1
        socket.ipv6 = is_ipv6(settings.endpoint)
        socket.maxmsgsize = MAX_CHUNK_BYTES + 1024
        # No high-water mark and no heartbeats of ZeroMQ's own: libzmq 4.3.5 aborts the process when a connection breaks
        # while its messages wait at the mark and a heartbeat, of either side, is due. `Connections` bounds what is held
        # by bytes and closes connections without a session; the ledger ends silent sessions.
        socket.rcvhwm = 0
        socket.handshake_ivl = 10_000
        if settings.keys is not None:
            self._authenticator, self.clients = serve_encrypted(self._context, socket, settings.keys)
        try:
            socket.bind(settings.endpoint)
        except zmq.ZMQError as error:
            raise IntakeError(
                f"stream.endpoint = {show_value(settings.endpoint)} cannot be bound: {_bind_advice(error)}"
            ) from None


def _bind_advice(error: zmq.ZMQError) -> str:
    """Why an endpoint cannot be bound, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"{error.strerror}; is another trainer running? Stop it or choose another endpoint"
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS):
        return f"{error.strerror}; name a file in a folder that exists and that you may write to, or a port above 1023"
    return f"{error.strerror}; name an address of this machine"
