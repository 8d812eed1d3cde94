"""The trainer's end of the stream: one thread, one ROUTER socket, frames → ledger → rows of the buffer.

Ledger and buffer sit behind one lock. The socket's thread brings rows in; the training thread takes batches out with
`take` and says what it has consumed with `trained`. A chunk is copied once, from the received frame into its slots.

A connection holds one session, and no message ends the thread: what goes wrong while one is handled ends the session
that it came from, with REJECT and the code `internal`. A chunk is copied before the ledger counts its rows, so that the
two agree whatever fails. What ZeroMQ holds of unfinished messages, and for whom, is the matter of `connections`.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import zmq
from zmq.auth.thread import ThreadAuthenticator

from producer.common.addresses import is_ipv6
from producer.common.logs import OutsideLog
from producer.common.toml import show_value
from producer.keys import Clients, serve_encrypted
from producer.settings import StreamSettings
from producer.wire import (
    DTYPE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_HEADER_BYTES,
    Bye,
    Chunk,
    Credit,
    Heartbeat,
    Hello,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    WireError,
    decode,
    encode,
)
from trainer.phases import RunPhase
from trainer.planning.cost import buffer_bytes
from trainer.report import StreamReport
from trainer.state.format import NEW_BUFFER, BufferState
from trainer.stream.buffer import Batch, ShuffleBuffer
from trainer.stream.connections import Connection, Connections
from trainer.stream.ledger.ledger import AcceptedChunk, Ledger, StreamPhase
from trainer.stream.ledger.sessions import Send, activation_bytes
from trainer.stream.ledger.shards import Quarantine, SuspectShard

log = logging.getLogger("sluice.trainer")

POLL_MILLISECONDS = 5
RECEIVE_SECONDS = 0.02
"""Messages are received for about this long before the ledger's clock ticks again."""
MOST_FRAMES = 2
"""Of a message: its header, and for some kinds one frame of data."""
FRAMES_TOLERATED = 64
"""A message of more takes so long to receive that its connection is closed."""
GOODBYE_SECONDS = 5.0
TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BITS = {"bfloat16": np.int16, "float32": np.int32}
INFINITY = {2: 0x7F80, 4: 0x7F800000}
"""The bits of infinity in bfloat16 and float32; those of the NaNs come after them."""
INTERNAL = "the trainer could not handle a message of this session; its log says why"
WITHDRAWN = Reject(code="key", reason="its key was withdrawn from the trainer's clients folder", retry=False)
NEWS_SECONDS = 0.2
"""Failed handshakes and closed connections are asked for this often."""


class IntakeError(RuntimeError):
    """The stream cannot be opened. The message is for the operator."""


class NoRoomError(RuntimeError):
    """No buffer can be made for what a HELLO announces. The message is for its sender."""


@dataclass(frozen=True)
class BufferReport:
    """The buffer and the wait for it."""

    phase: RunPhase
    """FILLING, TRAINING, STARVED or DRAINING."""
    rows: int
    capacity: int
    data_wait_seconds: float


class Interrupt(Protocol):
    """What ends a wait early: an event, or something else that can be set."""

    def is_set(self) -> bool: ...


class Intake:
    """See the module's docstring. Used as a context manager; `take` and `trained` belong to one training thread."""

    def __init__(
        self,
        settings: StreamSettings,
        ledger: Ledger,
        make_buffer: Callable[[Hello], ShuffleBuffer],
        saved: BufferState = NEW_BUFFER,
    ) -> None:
        """`make_buffer` may raise NoRoomError; `saved` is what a checkpoint kept of the buffer."""
        self.ledger = ledger
        self.buffer: ShuffleBuffer | None = None
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._make_buffer = make_buffer
        self._saved = saved
        self._settings = settings
        self._stop = threading.Event()
        self._route_of: dict[str, bytes] = {}
        self._session_of: dict[bytes, str] = {}
        self._data_wait = 0.0
        self._served = False
        self._next_news = 0.0
        self._emptied = float("-inf")
        """When the socket was last found empty."""
        self._ticked = time.monotonic()
        """When the ledger's clock last ticked without a fault."""
        self._outside = OutsideLog(log)
        self._connection_of: dict[str, Connection] = {}
        """Each session's connection."""
        self._buffered: Hello | None = None
        """The stream that the buffer was made for."""
        self._looked = time.monotonic()
        self._credit_wait = 0.0
        """Seconds in which every producer with work lacked credit."""
        self._waits = deque([(self._looked, 0.0, 0.0)], maxlen=11)
        """(when, data wait, credit wait until then), a second apart."""
        self._awaited: int | None = None
        """Rows that the training thread waits for."""
        self._failure: BaseException | None = None
        self._outbox: list[Send] = []
        self._authenticator: ThreadAuthenticator | None = None
        self._clients: Clients | None = None
        self._key_of: dict[str, bytes] = {}
        """Each session's public key, where the stream is encrypted."""
        self._keys_changed = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._connections = Connections(self._socket, settings.keys is not None)
        try:
            self._bind()
        except BaseException:
            self._close()
            self._end_context()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def __enter__(self) -> Intake:
        self._connections.start(self.endpoint)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._end_context()

    def keys_changed(self) -> None:
        """Sessions whose key is no longer there end; the others do not notice. For a signal's handler."""
        self._keys_changed.set()

    # The training thread's side

    @property
    def failure(self) -> BaseException | None:
        """What has ended the socket's thread, if anything has."""
        return self._failure

    @property
    def phase(self) -> StreamPhase:
        """How much is still to come."""
        with self.lock:
            return self.ledger.phase

    @property
    def is_winding_down(self) -> bool:
        """`wind_down` was called: producers are given no more work."""
        return self.ledger.is_winding_down

    @property
    def run_id(self) -> str:
        """The run's name in HELLO, checkpoints and snapshots."""
        return self.ledger.run

    @property
    def tokens_trained(self) -> int:
        """Since the run began, restarts included."""
        return self.ledger.tokens_trained

    @property
    def epoch(self) -> int:
        """The epoch whose shards are leased, from 0."""
        return self.ledger.shards.epoch

    @property
    def stream(self) -> Hello | None:
        """What the run streams; None until the first activations have arrived, which decide it for good."""
        with self.lock:
            return self.ledger.identity.hello if self.ledger.identity.is_settled else None

    @property
    def norm_bounds(self) -> list[float] | None:
        """Of each hook, the norm beyond which producers drop an activation."""
        return self.ledger.identity.norm_bounds

    def quarantine(self) -> Quarantine:
        """The quarantined shards."""
        with self.lock:
            return self.ledger.quarantine

    def suspects(self) -> list[SuspectShard]:
        """Shards on which producers are lost; they are leased last."""
        with self.lock:
            return self.ledger.shards.suspects()

    def retry_quarantined(self) -> int:
        """Leases quarantined shards again, for the activations that they lack; how many shards these are."""
        with self.lock:
            return self.ledger.retry_quarantined()

    def wind_down(self) -> int:
        """Asks nothing more of producers; how many tokens are buffered or may still come."""
        with self.lock:
            self.ledger.wind_down()
            return self.ledger.tokens_buffered + self.ledger.tokens_credited

    def filled(self, count: int) -> bool:
        """Whether `take(count)` would not wait."""
        with self.lock:
            return self._ready(count)

    def wait_until_filled(self, count: int, stop: Interrupt, seconds: float = float("inf")) -> bool:
        """Waits until `take(count)` would not; False when `stop` was set, the data ended or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._awaited = count
            try:
                while not self._ready(count):
                    self._refuse_gaps()
                    if stop.is_set() or self._is_over() or time.monotonic() >= deadline:
                        return False
                    self._wait()
            finally:
                self._awaited = None
            return True

    def take(self, count: int, stop: Interrupt) -> Batch | None:
        """The next batch: `count` rows, fewer at the very end; None when the data is over or `stop` was set.

        Rows are handed out while the buffer is at least half full, so that each batch mixes many contexts; once no
        further row will come, it is drained.
        """
        if not self.wait_until_filled(count, stop):
            return None
        with self.lock:
            assert self.buffer is not None
            self._served = True
            return self.buffer.draw(min(count, self.buffer.rows))

    def trained(self, batch: Batch) -> None:
        """A step has consumed `batch`: its rows count as trained and their places are free again."""
        with self.lock:
            self.ledger.mark_trained(batch.serial, batch.position)

    def peek(self, count: int) -> list[torch.Tensor]:
        """Copies of up to `count` waiting rows per hook, none while no producer has come; they stay."""
        with self.lock:
            return self.buffer.peek(count) if self.buffer is not None else []

    def buffer_state(self) -> BufferState:
        """What a checkpoint keeps of the buffer."""
        with self.lock:
            return self._saved if self.buffer is None else self.buffer.state()

    def drain(self, finished: bool) -> None:
        """Tells every producer that this trainer is done or leaves, and waits a moment for them to go.

        A finished run also waits for producers that are just coming back: nobody else would tell them.
        """
        with self._changed:
            expected = len(self.ledger.sessions)
            self._outbox += self.ledger.drain(finished)
            deadline = time.monotonic() + (GOODBYE_SECONDS if finished else 1.0)
            while time.monotonic() < deadline and (self.ledger.sessions or (finished and not expected)):
                self._changed.wait(0.05)

    def stream_report(self) -> StreamReport:
        with self.lock:
            (began, data, credit), (now, data_now, credit_now) = self._waits[0], self._waits[-1]
            elapsed = max(now - began, 1e-9)
            return replace(
                self.ledger.report(),
                data_wait_ratio=min(1.0, (data_now - data) / elapsed),
                credit_wait_ratio=min(1.0, (credit_now - credit) / elapsed),
            )

    def buffer_report(self) -> BufferReport:
        with self.lock:
            rows = self.buffer.held if self.buffer else 0
            capacity = self.ledger.limits.capacity
            if self.ledger.phase is not StreamPhase.OPEN:
                phase = RunPhase.DRAINING
            elif not self._served:
                phase = RunPhase.FILLING
            else:
                phase = RunPhase.TRAINING if rows >= capacity // 2 else RunPhase.STARVED
            return BufferReport(phase, rows, capacity, self._data_wait)

    def _ready(self, count: int) -> bool:
        if self._failure is not None:
            raise IntakeError(f"the stream's thread failed: {self._failure!r}") from self._failure
        if self.buffer is None:
            return False
        is_full = self.buffer.is_full_enough(count, self.ledger.shards.oldest)
        return is_full or (self.buffer.rows > 0 and not self.ledger.phase.is_receiving)

    def _refuse_gaps(self) -> None:
        """Deterministic mode: a shard that is quarantined ends the run; how much of it came depends on who failed."""
        if self.ledger.policy.quarantine_ends_run and self.ledger.shards.quarantined:
            shard = self.ledger.shards.quarantined[0]
            raise IntakeError(
                f"shard {shard.shard} failed ({shard.reason}), and run.deterministic trains on all rows or none: "
                "mend what is wrong with it, then start the trainer again; it goes on from its checkpoint"
            )

    def _is_over(self) -> bool:
        return self.ledger.phase.is_over

    def _wait(self) -> None:
        began = time.monotonic()
        self._changed.wait(timeout=0.1)
        self._data_wait += time.monotonic() - began

    # The socket's thread

    def _bind(self) -> None:
        socket, settings = self._socket, self._settings
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
            self._authenticator, self._clients = serve_encrypted(self._context, socket, settings.keys)
        try:
            socket.bind(settings.endpoint)
        except zmq.ZMQError as error:
            raise IntakeError(
                f"stream.endpoint = {show_value(settings.endpoint)} cannot be bound: {_why(error)}"
            ) from None

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._socket.poll(POLL_MILLISECONDS):
                    self._receive_waiting()
                else:
                    self._emptied = time.monotonic()
                try:
                    self._keep_house()
                    self._ticked = time.monotonic()
                except Exception:
                    # Without its clock the ledger serves nobody: a fault that lasts must be seen.
                    if time.monotonic() - self._ticked > self._settings.dead_seconds:
                        raise
                    self._fail("the ledger's clock")
        except BaseException as error:
            self._failure = error
            log.exception("the stream's thread failed")
        finally:
            self._close()

    def _keep_house(self) -> None:
        """What is done whether or not a message came: the ledger's clock ticks, and who waits for rows is woken."""
        self._hear_news()
        if self._keys_changed.is_set():
            self._keys_changed.clear()
            self._send(self._end_the_withdrawn())
        with self.lock:
            self._watch_waits()
            sends, self._outbox = self._outbox + self.ledger.tick(time.monotonic()), []
            # Not for every chunk: a thread that is woken takes the interpreter from this one.
            if self._awaited is None or self._ready(self._awaited) or self._is_over():
                self._changed.notify_all()
        self._send(sends)
        self._forget_the_ended()
        self._outside.flush()
        if self._clients is not None:
            self._clients.outside.flush()

    def _watch_waits(self) -> None:
        """Who waits for whom, kept for the last ten seconds; and, every second, whether the books balance."""
        now = time.monotonic()
        sessions = self.ledger.sessions.values()
        if any(one.leases for one in sessions) and not any(one.leases and one.credit_tokens for one in sessions):
            self._credit_wait += now - self._looked
        self._looked = now
        if now - self._waits[-1][0] >= 1.0:
            self._waits.append((now, self._data_wait, self._credit_wait))
            for fault in self.ledger.audit(self.buffer.held if self.buffer is not None else 0):
                log.error("an invariant is broken, please report it: %s", fault)
            for notice in self.ledger.failures.pop_notices():
                self._outside.warning("%s", notice)

    def _close(self) -> None:
        self._socket.disable_monitor()
        self._connections.stop()
        self._socket.close()
        self._outside.flush(everything=True)

    def _end_context(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def _hear_news(self) -> None:
        """Counts the connections that were closed, and those that were turned away for their keys."""
        if time.monotonic() < self._next_news:
            return
        self._next_news = time.monotonic() + NEWS_SECONDS
        closed, failed = self._connections.news()
        if self._clients is None:
            # A producer without keys may see first that the two do not fit, and hang up.
            failed.pop(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, None)
        with self.lock:
            self.ledger.errors.update(closed)
            self.ledger.auth_failures += failed.total()
            failures = self.ledger.auth_failures
        told = failures - failed.total()
        # An unknown key is told where it is looked up, in producer.keys.
        failed.pop(zmq.EVENT_HANDSHAKE_FAILED_AUTH, None)
        if failed and (told == 0 or told // 100 < failures // 100):
            self._outside.warning(
                "somebody was turned away at %s, or hung up, %d times by now: stream.keys must be set on both "
                "sides or on neither, and the producer's server.key must be this trainer's",
                self.endpoint, failures,
            )  # fmt: skip

    def _end_the_withdrawn(self) -> list[Send]:
        with self.lock:
            gone = [
                name for name, key in self._key_of.items() if self._clients is not None and not self._clients.know(key)
            ]
            log.info("keys were read again: %d of %d sessions end", len(gone), len(self.ledger.sessions))
            for name in gone:
                self.ledger.bye(name, Bye(), time.monotonic())
        return [Send(name, WITHDRAWN) for name in gone]

    def _receive_waiting(self) -> None:
        """Takes what has arrived, up to bounds, so that credit and heartbeats are never long in coming."""
        until = time.monotonic() + RECEIVE_SECONDS
        for _ in range(32):
            try:
                route = self._socket.recv(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                self._emptied = time.monotonic()
                return
            frames, count = self._receive_frames(route)
            try:
                sends = self._handle(route.bytes, frames, count)
            except Exception:
                sends = self._fail("a message", route.bytes)
            self._send(sends)
            if time.monotonic() > until:
                return

    def _receive_frames(self, route: zmq.Frame) -> tuple[list[zmq.Frame], int]:
        """The first frames of a message behind its route, as many as any message has, and how many there are."""
        frames: list[zmq.Frame] = []
        count, frame = 0, route
        while frame.more:
            frame = self._socket.recv(copy=False)
            count += 1
            if count <= MOST_FRAMES:
                frames.append(frame)
        return frames, count

    def _fail(self, what: str, route: bytes | None = None) -> list[Send]:
        """An exception of ours: it is told and counted, and the session that it came from, if any, ends."""
        self._outside.exception("%s could not be handled, please report it", what)
        with self.lock:
            session = None if route is None else self._session_of.get(route)
            if session in self.ledger.sessions:
                return self.ledger.reject(session, "internal", INTERNAL)
            self.ledger.errors["internal"] += 1
            return [] if route is None else self._turn_away(route, "internal", INTERNAL, retry=True)

    def _handle(self, route: bytes, frames: list[zmq.Frame], count: int) -> list[Send]:
        """Answers to a message of `count` frames, of which `frames` are the first."""
        session = self._session_of.get(route)
        connection = self._connection_of.get(session) if session is not None else None
        if session is not None and connection is not None and not connection.brought(frames[0]):
            with self.lock:
                self.ledger.disconnect(session)  # another connection has taken this one's identity
            self._leave_route(session)
            session = connection = None
        if connection is None:
            connection = self._connections.of(frames[0])
        if connection is not None:
            self._connections.deliver(connection, frames, self._emptied)
        try:
            if not 1 <= count <= MOST_FRAMES:
                if connection is not None and count > FRAMES_TOLERATED:
                    self._connections.close(connection, "frames", f"a message of {count:,} frames")
                raise WireError("frames", f"message of {count} frames")
            message = decode(frames[0].buffer)
        except WireError as error:
            log.debug("message dropped: %s", error)
            with self.lock:
                self.ledger.errors[error.kind] += 1
                if error.kind == "version" and session is None:
                    return self._turn_away(route, "version", f"{error}; run one release on both sides", retry=False)
            return []
        now = time.monotonic()
        with self._changed:
            if isinstance(message, Hello):
                if connection is not None and not self._connections.hear_hello(connection, now):
                    return []
                return self._welcome(route, message, now, frames[0], connection)
            if session is None or session not in self.ledger.sessions:
                return self._stranger(route, message)
            if isinstance(message, Chunk):
                return self._take_in(session, message, frames[1] if len(frames) == 2 else None, now)
            if isinstance(message, ShardEnd):
                return self.ledger.shard_end(session, message, now)
            if isinstance(message, ShardFail):
                self._outside.warning("shard %d failed: %s", message.shard, message.error)
                return self.ledger.shard_fail(session, message, now)
            if isinstance(message, Heartbeat):
                return self.ledger.heartbeat(session, message, now)
            if isinstance(message, Bye):
                return self.ledger.bye(session, message, now)
            self.ledger.errors["direction"] += 1
            return []

    def _welcome(
        self, route: bytes, hello: Hello, now: float, frame: zmq.Frame, connection: Connection | None
    ) -> list[Send]:
        before = self._session_of.get(route)
        if before != hello.session and before in self.ledger.sessions:
            self.ledger.bye(before, Bye(), now)  # a connection holds one session
        self._leave_route(hello.session, route)
        self._route_of[hello.session], self._session_of[route] = route, hello.session
        if connection is not None:
            self._connection_of[hello.session] = connection
        if self._clients is not None:
            self._key_of[hello.session] = key = str(frame.get("User-Id")).encode()
            if not self._clients.know(key):  # the connection is older than its key's withdrawal
                return [Send(hello.session, WITHDRAWN)]
        sends = self.ledger.hello(hello, now)
        if hello.session in self.ledger.sessions:
            try:
                self._prepare_buffer()
            except NoRoomError as error:
                sends = self.ledger.reject(hello.session, "memory", str(error), retry=False)
            else:
                self._outside.info("producer %s joins (%d at work)", hello.name, len(self.ledger.sessions))
                if connection is not None:
                    self._connections.hold_session(connection)
        for send in sends:
            if isinstance(send.message, Reject):
                peer = connection.peer if connection is not None else "a connection that is gone"
                self._outside.warning("producer %s of %s refused: %s", hello.name, peer, send.message.reason)
        return sends

    def _prepare_buffer(self) -> None:
        """A buffer for what the run streams. Before the first row another stream may take the place of the first."""
        stream = self.ledger.identity.hello
        assert stream is not None
        if self._buffered is stream:
            return
        self.buffer = self._buffered = None  # before its successor is made: there may be no room for both
        buffer = self._make_buffer(stream)
        buffer.restore(self._saved)
        self.buffer, self._buffered = buffer, stream

    def _stranger(self, route: bytes, message: Message) -> list[Send]:
        """Someone whose session is not known (any more): a zombie, or a producer of an earlier start."""
        self.ledger.errors["unknown_session"] += 1
        if isinstance(message, Chunk):
            self.ledger.rejected["unknown_session"] += message.rows
        return self._turn_away(route, "unknown_session", "this session has ended; start a new one", retry=True)

    def _turn_away(self, route: bytes, code: str, reason: str, retry: bool) -> list[Send]:
        """A REJECT for someone without a session."""
        session = self._session_of.setdefault(route, f"stranger-{route.hex()}")
        self._route_of[session] = route
        return [Send(session, Reject(code=code, reason=reason, retry=retry))]

    def _take_in(self, session: str, chunk: Chunk, payload: zmq.Frame | None, now: float) -> list[Send]:
        assert self.buffer is not None
        data = payload.buffer if payload is not None else memoryview(b"")
        x = _views(self.ledger.sessions[session].hello, data, chunk.rows)
        if x is not None and not is_finite(x):
            reason = "chunk holds NaN or infinity"
            if self.ledger.sessions[session].hello.provenance.get("model_dtype") == "float16":
                reason += ", as float16 gives beyond 65504; set model.dtype to bfloat16 or float32"
            return self.ledger.reject(session, "non_finite", reason, chunk.rows, blames_shard=True)
        buffer = self.buffer

        def insert(accepted: AcceptedChunk) -> None:
            if x is not None:
                buffer.insert(x, accepted.serial, accepted.position)

        return self.ledger.chunk(session, chunk, len(data), now, insert)[1]

    def _send(self, sends: list[Send]) -> None:
        for send in sends:
            if (route := self._route_of.get(send.session)) is None:
                continue
            try:
                if isinstance(send.message, Credit):
                    self._allow(send.session)
                frames = [route, encode(send.message)] + ([send.payload] if send.payload is not None else [])
                self._socket.send_multipart(frames, zmq.DONTWAIT)
            except Exception as error:
                if not (isinstance(error, zmq.ZMQError) and error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN)):
                    self._fail("an answer")
                with self.lock:
                    self.ledger.disconnect(send.session)

    def _allow(self, session: str) -> None:
        """Its connection may hold the chunks that it has credit for."""
        connection, known = self._connection_of.get(session), self.ledger.sessions.get(session)
        if connection is not None and known is not None:
            headers = known.chunks_in_flight * MAX_HEADER_BYTES
            self._connections.allow(connection, known.credit_tokens * activation_bytes(known.hello) + headers)

    def _forget_the_ended(self) -> None:
        """Drops the routes of sessions that are over; whoever still speaks there is a stranger."""
        for session in self._route_of.keys() - self.ledger.sessions.keys():
            self._leave_route(session)
            self._key_of.pop(session, None)

    def _leave_route(self, session: str, but: bytes | None = None) -> None:
        """The connection of a session, unless it is `but`, holds it no longer."""
        route = self._route_of.get(session)
        if route is None or route == but:
            return
        del self._route_of[session]
        connection = self._connection_of.pop(session, None)
        if self._session_of.get(route) == session:
            del self._session_of[route]
            if connection is not None and connection not in self._connection_of.values():
                self._connections.end_session(connection)


def check_room(hello: Hello, rows: int, free: float) -> None:
    """Whether a buffer of `rows` rows of this stream fits into `free` bytes. Raises NoRoomError when not."""
    number = DTYPE_BYTES[hello.dtype]
    needed = buffer_bytes(rows, [hook.width for hook in hello.hooks], number)
    if needed > free:
        widest = max(hello.hooks, key=lambda hook: hook.width)
        raise NoRoomError(
            f"hook {widest.name[:100]} has width {widest.width:,}, and the {len(hello.hooks)} hook(s) need "
            f"{needed / 1e9:,.1f} GB for buffer.rows = {rows:,}, where {free / 1e9:,.1f} GB of memory are free; "
            "lower buffer.rows, or start the trainer where there is more memory"
        )


def _why(error: zmq.ZMQError) -> str:
    """Why an endpoint cannot be bound, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"{error.strerror}; is another trainer running? Stop it or choose another endpoint"
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS):
        return f"{error.strerror}; name a file in a folder that exists and that you may write to, or a port above 1023"
    return f"{error.strerror}; name an address of this machine"


def _views(hello: Hello, data: memoryview, rows: int) -> list[np.ndarray] | None:
    """A payload's bits as one [rows, width] array per hook, without copying; None when it is empty or of another size.

    By numpy: each of torch's operations lets go of the interpreter, and would have to wait for it again.
    """
    widths = [hook.width for hook in hello.hooks]
    if not rows or len(data) != rows * sum(widths) * DTYPE_BYTES[hello.dtype]:
        return None
    bits = np.frombuffer(data, BITS[hello.dtype])
    ends = np.cumsum([rows * width for width in widths])
    return [bits[end - rows * width : end].reshape(rows, width) for end, width in zip(ends, widths, strict=True)]


def is_finite(bits: list[np.ndarray]) -> bool:
    """No NaN or infinity in any array of numbers' bits. Exact, and several times faster than a sum.

    As integers, the positive ones that are not finite are the largest; as unsigned ones, the negative ones are.
    """
    for part in bits:
        infinity, sign = INFINITY[part.itemsize], 1 << (8 * part.itemsize - 1)
        if part.max() >= infinity or part.view(f"u{part.dtype.itemsize}").max() >= infinity + sign:
            return False
    return True
