"""The producer's end of the stream: one thread, one DEALER socket, and a conversation that can start over.

The loop in `produce.py` asks for leases and hands in chunks; the thread here owns the socket, sends what credit
allows, answers heartbeats, and opens a new session whenever the old one ends. Losing a session loses nothing: what
was not received is leased again, to this producer or another.

    connecting ──WELCOME──▶ working ──REJECT (retry) / silence / DRAIN (trainer leaves)──▶ connecting
                               └──DRAIN (finished) / REJECT (final) / patience over──▶ gone
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import recv_monitor_message

from producer.common.addresses import is_ipv6
from producer.common.logs import OutsideLog
from producer.common.shell import shell_command
from producer.common.toml import show_value
from producer.keys import connect_encrypted
from producer.settings import StreamSettings
from producer.wire import (
    MAX_MASK_BYTES,
    Bye,
    Chunk,
    Credit,
    Drain,
    Heartbeat,
    Hello,
    Lease,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    Welcome,
    WireError,
    decode,
    encode,
)

log = logging.getLogger("sluice.producer")

POLL_MILLISECONDS = 5
Payload = bytes | memoryview
FIRST_WARNING_SECONDS = 3.0
RETRY_SECONDS = 1.0
"""Before the next HELLO, where the last one was not welcomed."""
QUEUED_CHUNKS = 2
"""Chunks finished and not yet on the socket: the next forward pass overlaps with sending."""


class SessionLost(Exception):
    """The session that a lease belonged to is over; drop the shard and ask for the next lease."""


class Finished(Exception):
    """There is nothing more to do: the run is over."""


class RefusedByTrainer(Exception):
    """The trainer will never take this producer. The message says why."""


class NoTrainer(Exception):
    """No trainer answered for stream.patience_seconds. The message says what to do."""


@dataclass
class _Session:
    """What one conversation with one start of the trainer knows."""

    name: str
    welcome: Welcome | None = None
    said_hello: float | None = None
    """When HELLO left; None while nobody is there to take it."""
    granted: int = 0
    sent: int = 0
    leases: deque[tuple[Lease, bytes]] = field(default_factory=deque)
    last_heard: float = field(default_factory=time.monotonic)
    last_beat: float = 0.0


class Link:
    """See the module's docstring. A context manager; its methods are for one other thread."""

    def __init__(self, settings: StreamSettings, hello: Hello) -> None:
        self._settings = settings
        self._hello = hello
        self._context = zmq.Context()
        self._changed = threading.Condition()
        self._outbox: deque[tuple[Message, Payload | None]] = deque()
        self._bell, self._clapper = socket.socketpair()
        self._clapper.setblocking(False)
        self._session = _Session("")
        self._ending: Exception | None = None
        self._leaving = False
        self._socket: zmq.Socket | None = None
        self._monitor: zmq.Socket | None = None
        self._progress = 0
        self._outside = OutsideLog(log)
        self._failed_handshakes = 0
        self._warn_at = self._give_up_at = 0.0
        self.moved_at = time.monotonic()
        """When the loop last got on with its work, or waited for the trainer: it stands still when the loop hangs."""
        self.sessions = 0
        self.stall_seconds = {"credit": 0.0, "lease": 0.0}
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def __enter__(self) -> Link:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._ring()
        self._thread.join()
        self._context.term()
        self._bell.close()
        self._clapper.close()

    # The loop's side

    def next_lease(self) -> tuple[Lease, bytes, Welcome]:
        """The next shard to work on, its mask, and the session's terms; waits for one.

        Raises Finished, RefusedByTrainer or NoTrainer when there will be none.
        """
        with self._changed:
            while not self._session.leases:
                if self._ending is not None:
                    raise self._ending
                self._wait("lease")
            lease, mask = self._session.leases[0]
            assert self._session.welcome is not None
            return lease, mask, self._session.welcome

    @property
    def next_shard(self) -> int | None:
        """The shard that `next_lease` will give after the present one, when it is known already."""
        with self._changed:
            return self._session.leases[1][0].shard if len(self._session.leases) > 1 else None

    def send_chunk(self, lease: Lease, chunk: dict, payload: Payload) -> None:
        """Sends one chunk of the lease as soon as credit allows. `payload` must not be written to afterwards.

        Raises SessionLost when the lease is no longer ours.
        """
        with self._changed:
            while True:
                self._check(lease)
                if self._session.sent < self._session.granted and len(self._outbox) < QUEUED_CHUNKS:
                    break
                self._wait("credit")
            self._session.sent += 1
            assert self._session.welcome is not None
            message = Chunk(
                number=self._session.sent,
                incarnation=self._session.welcome.incarnation,
                shard=lease.shard,
                epoch=lease.epoch,
                attempt=lease.attempt,
                **chunk,
            )
            self._outbox.append((message, payload))
            self._move()
        self._ring()

    def end_shard(self, lease: Lease, message: ShardEnd | ShardFail) -> None:
        """Says that the lease is done or cannot be. Raises SessionLost when it is no longer ours."""
        with self._changed:
            self._check(lease)
            self._session.leases.popleft()
            self._outbox.append((message, None))
            self._move()
        self._ring()

    def moved(self) -> None:
        """Tells the trainer, with the next heartbeat, that work goes on although no chunk is ready."""
        with self._changed:
            self._move()

    @property
    def state(self) -> str:
        with self._changed:
            if self._session.welcome is None:
                return "connecting"
            return "working" if self._session.leases else "idle"

    def _check(self, lease: Lease) -> None:
        if self._leaving or not self._session.leases or self._session.leases[0][0] is not lease:
            raise SessionLost

    def _ring(self) -> None:
        """Wakes the socket's thread: there is something to send."""
        with suppress(BlockingIOError):  # it has been rung before, and not heard yet
            self._clapper.send(b"!")

    def _move(self) -> None:
        self._progress += 1
        self.moved_at = time.monotonic()

    def _wait(self, cause: str) -> None:
        began = time.monotonic()
        self._changed.wait(timeout=0.1)
        self.moved_at = time.monotonic()
        self.stall_seconds[cause] += self.moved_at - began

    # The socket's thread

    def _run(self) -> None:
        try:
            self._begin_search()
            while self._ending is None and not self._leaving:
                if self._converse():
                    self._begin_search()
        except Exception as error:
            self._ending = error
        finally:
            self._close(linger=0)
            self._outside.flush(everything=True)
            with self._changed:
                self._session = _Session("")
                self._changed.notify_all()

    def _begin_search(self) -> None:
        now = time.monotonic()
        self._warn_at, self._give_up_at = now + FIRST_WARNING_SECONDS, now + self._settings.patience_seconds

    def _converse(self) -> bool:
        """One session from HELLO to its end; True when a trainer answered."""
        self._open()
        session = self._session
        while self._stands(session):
            self._receive(session)
            if not self._stands(session):
                break
            self._send(session)
            self._outside.flush()
            if self._leaving:
                self._say_bye()
                break
            self._look_at_clock(session, time.monotonic())
        self._close(linger=0)
        return session.welcome is not None

    def _stands(self, session: _Session) -> bool:
        return self._ending is None and self._session is session

    def _look_at_clock(self, session: _Session, now: float) -> None:
        """Ends a session in which nobody answers, and a search that found nobody."""
        if session.welcome is not None:
            if now - session.last_heard > session.welcome.dead_seconds:
                log.warning("trainer silent for %.0f s; starting a new session", now - session.last_heard)
                self._drop_session()
        elif now >= self._give_up_at:
            self._end(NoTrainer(f"{self._nobody()}; gave up after {self._settings.patience_seconds:g} s"))
        elif now >= self._warn_at:
            log.warning("%s; looking for %.0f s more", self._nobody(), self._give_up_at - now)
            self._warn_at = now + 30.0
        elif session.said_hello is not None and now - session.said_hello > self._settings.dead_seconds:
            # The trainer that took our HELLO died before it answered: the next one knows nothing of us.
            self._drop_session()

    def _drop_session(self) -> None:
        with self._changed:
            self._session = _Session("")
            self._changed.notify_all()

    def _open(self) -> None:
        self._socket = dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.immediate = 1
        dealer.ipv6 = is_ipv6(self._settings.endpoint)
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 200, 2000
        dealer.maxmsgsize = MAX_MASK_BYTES + 1024  # CURVE adds some bytes to a frame
        dealer.rcvhwm = 0  # see the trainer's socket: libzmq aborts where a connection breaks at the high-water mark
        if self._settings.keys is not None:
            connect_encrypted(dealer, self._settings.keys)
        self._monitor = dealer.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        try:
            dealer.connect(self._settings.endpoint)
        except zmq.ZMQError as error:
            raise NoTrainer(
                f"stream.endpoint = {show_value(self._settings.endpoint)} is no address: {error.strerror}"
            ) from None
        with self._changed:
            self._outbox.clear()
            self._session = _Session(uuid.uuid4().hex)
            self._changed.notify_all()
        self._outbox.append((self._hello.model_copy(update={"session": self._session.name}), None))

    def _receive(self, session: _Session) -> None:
        """Waits until the trainer says something or there is something to send, and takes in one message."""
        assert self._socket is not None
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        events = dict(poller.poll(POLL_MILLISECONDS))
        if self._bell.fileno() in events:
            self._bell.recv(4096)
        if self._socket not in events:
            self._watch_handshake()
            return
        frames = self._socket.recv_multipart(copy=True)
        try:
            message = decode(frames[0])
        except WireError as error:
            self._outside.warning("message from the trainer dropped: %s", error)
            if error.kind == "version":
                self._end(RefusedByTrainer(f"the trainer at {self._settings.endpoint} is of another release: {error}"))
            return
        session.last_heard = time.monotonic()
        with self._changed:
            if isinstance(message, Welcome) and message.session == session.name:
                session.welcome = message
                self.sessions += 1
                self._failed_handshakes = 0
                self._outside.info("welcomed by run %s at %s", message.run, self._settings.endpoint)
            elif isinstance(message, Lease):
                session.leases.append((message, frames[1] if len(frames) > 1 else b""))
            elif isinstance(message, Credit):
                session.granted = max(session.granted, message.number)
            elif isinstance(message, Reject):
                self._rejected(message)
            elif isinstance(message, Drain):
                self._drained(message)
            self._changed.notify_all()

    def _rejected(self, reject: Reject) -> None:
        if reject.retry:
            self._outside.warning("session ended by the trainer (%s): %s", reject.code, reject.reason)
            welcomed = self._session.welcome is not None
            self._session = _Session("")
            if not welcomed:
                self._changed.wait(timeout=RETRY_SECONDS)
        else:
            self._ending = RefusedByTrainer(f"refused by the trainer: {reject.reason}")

    def _drained(self, drain: Drain) -> None:
        self._say_bye()
        if drain.finished:
            self._ending = Finished()
        else:
            log.info("the trainer leaves; waiting for it to come back")
            self._session = _Session("")
            # It closes its socket in a moment: a new session now would talk to the old process.
            self._changed.wait(timeout=1.0)

    def _send(self, session: _Session) -> None:
        now = time.monotonic()
        if session.welcome is not None and now - session.last_beat >= session.welcome.heartbeat_seconds:
            session.last_beat = now
            self._say(Heartbeat(progress=self._progress))
        while self._outbox:
            message, payload = self._outbox[0]
            if not self._say(message, payload):
                return
            if isinstance(message, Hello):
                session.said_hello = now
            with self._changed:
                if self._outbox:
                    self._outbox.popleft()
                self._changed.notify_all()

    def _say(self, message: Message, payload: Payload | None = None) -> bool:
        """Hands one message to the socket; False when it cannot take it now."""
        assert self._socket is not None
        frames: list[Payload] = [encode(message)] if payload is None else [encode(message), payload]
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        return True

    def _say_bye(self) -> None:
        """The last word of a session; unlike anything else that waits in the socket, it should still arrive."""
        self._say(Bye())
        self._close(linger=500)

    def _watch_handshake(self) -> None:
        """Turns a failed handshake, which ZeroMQ keeps to itself, into one line for the operator."""
        while self._monitor is not None and self._monitor.poll(0):
            self._handshake_failed(recv_monitor_message(self._monitor)["event"])

    def _handshake_failed(self, event: int) -> None:
        endpoint = self._settings.endpoint
        self._failed_handshakes += 1
        often = self._failed_handshakes == 3
        disagreement = (
            f"no agreement on keys with {endpoint}: stream.keys must be set on both sides or on neither, "
            "and server.key here must be the trainer's"
        )
        # Often the other side just hangs up. A trainer that dies in mid-handshake looks like this once, one with other
        # keys for ever; but so does a tunnel or a proxy that has no trainer behind it yet.
        keys_are_wrong = often and self._settings.keys is not None and not self.sessions
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            unknown = f"the trainer at {endpoint} does not know this producer's key"
            cure = "copy clients/client.key of stream.keys into the clients folder of the trainer's keys"
            self._end(RefusedByTrainer(f"{unknown}: {cure}"))
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or keys_are_wrong:
            self._end(RefusedByTrainer(disagreement))
        elif often:
            log.warning("%s (or there is a tunnel, and no trainer at its end)", disagreement)

    def _end(self, reason: Exception) -> None:
        with self._changed:
            self._ending = self._ending or reason
            self._changed.notify_all()

    def _nobody(self) -> str:
        return (
            f"no trainer answers at {self._settings.endpoint} (start one with `{shell_command('trainer', 'RUN.toml')}`)"
        )

    def _close(self, linger: int) -> None:
        if self._socket is not None:
            if self._monitor is not None:
                self._socket.disable_monitor()
                self._monitor.close(0)
            self._socket.close(linger)
            self._socket = self._monitor = None
