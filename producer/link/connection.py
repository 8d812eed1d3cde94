"""One connection to the trainer: a DEALER socket, its handshake events, and what wakes the thread that waits on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from producer.common.addresses import is_ipv6
from producer.common.toml import show_value
from producer.keys import connect_encrypted
from producer.link.errors import NoTrainer
from producer.link.session import Payload
from producer.settings import StreamSettings
from producer.wire import MAX_MASK_BYTES, Bye, Message, encode

POLL_MILLISECONDS = 5
BYE_LINGER_MILLISECONDS = 500
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class WakeUp:
    """Wakes a thread that polls `reader`: a ZeroMQ socket may not be used from a second thread."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def wake(self) -> None:
        with suppress(BlockingIOError):  # the pair is full: the thread will wake anyway
            self._writer.send(b"!")

    def clear(self) -> None:
        """Forgets the calls of `wake` so far."""
        self.reader.recv(4096)

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


class TrainerConnection:
    """A socket to the trainer, from construction to `close`. For one thread."""

    def __init__(self, context: zmq.Context, settings: StreamSettings, wake_up: WakeUp) -> None:
        """Raises NoTrainer for an endpoint that ZeroMQ does not take, KeysError for keys that cannot be used."""
        self._wake_up = wake_up
        self._socket = context.socket(zmq.DEALER)
        self._monitor: zmq.Socket | None = None
        try:
            self._connect(settings)
        except BaseException:
            self.close()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(wake_up.reader, zmq.POLLIN)

    def _connect(self, settings: StreamSettings) -> None:
        dealer = self._socket
        dealer.linger = 0
        dealer.immediate = 1
        dealer.ipv6 = is_ipv6(settings.endpoint)
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 200, 2000
        dealer.maxmsgsize = MAX_MASK_BYTES + 1024  # CURVE adds some bytes to a frame
        dealer.rcvhwm = 0  # see the trainer's socket: libzmq aborts where a connection breaks at the high-water mark
        if settings.keys is not None:
            connect_encrypted(dealer, settings.keys)
        self._monitor = dealer.get_monitor_socket(HANDSHAKE_FAILURES)
        try:
            dealer.connect(settings.endpoint)
        except zmq.ZMQError as error:
            raise NoTrainer(
                f"stream.endpoint = {show_value(settings.endpoint)} is no address: {error.strerror}"
            ) from None

    def __enter__(self) -> TrainerConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self) -> list[bytes] | None:
        """Waits for a message, a call of `wake` or POLL_MILLISECONDS: the frames of one message, or None."""
        events = dict(self._poller.poll(POLL_MILLISECONDS))
        if self._wake_up.reader.fileno() in events:
            self._wake_up.clear()
        return self._socket.recv_multipart(copy=True) if self._socket in events else None

    def send(self, message: Message, payload: Payload | None = None) -> bool:
        """Hands one message to the socket; False when the socket cannot take it now."""
        frames: list[Payload] = [encode(message)] if payload is None else [encode(message), payload]
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        return True

    def failed_handshakes(self) -> Iterator[int]:
        """Yields the events of handshakes that failed since the last call."""
        while self._monitor is not None and self._monitor.poll(0):
            yield recv_monitor_message(self._monitor)["event"]

    def close_with_bye(self) -> None:
        """Sends BYE and closes; unlike anything else that waits in the socket, BYE should still arrive."""
        self.send(Bye())
        self.close(linger=BYE_LINGER_MILLISECONDS)

    def close(self, linger: int = 0) -> None:
        """Closes the socket; a second call does nothing."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None
        if not self._socket.closed:
            self._socket.close(linger)
