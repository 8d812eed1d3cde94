"""A small stream and both of its ends, for tests of sockets.

Each activation of the corpus holds its own name (shard, window, position), so that a test can compare what arrives.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
import zmq

from producer.keys import connect_encrypted
from producer.link import Link
from producer.packing import chunk_windows_of
from producer.produce import Producer
from producer.report import ProducerReport
from producer.settings import CorpusSettings, ProducerSettings, StreamSettings, SyntheticSettings
from producer.sources.base import Source, fingerprint
from producer.wire import (
    Bye,
    Chunk,
    Credit,
    Hello,
    Lease,
    Message,
    Welcome,
    decode,
    encode,
    pack_bits,
)
from tests.drills.named_producer import NamedSource
from trainer.stream.buffer import ShuffleBuffer
from trainer.stream.connections import ConnectionLimits
from trainer.stream.intake import Intake
from trainer.stream.ledger.credit import CreditPolicy
from trainer.stream.ledger.ledger import Ledger, Limits
from trainer.stream.payload import TORCH_DTYPE

SHARDS, WINDOWS, CONTEXT, D_IN = 6, 8, 8, 4
CHUNK_ROWS = 2 * CONTEXT
CAPACITY = 8 * CHUNK_ROWS
SHARD_ROWS = WINDOWS * CONTEXT

Name = tuple[int, int, int]
M = TypeVar("M", bound=Message)


def stream_settings(endpoint: str, **changes: Any) -> StreamSettings:
    quick: dict[str, Any] = {
        "dtype": "float32",
        "heartbeat_seconds": 0.1,
        "dead_seconds": 30.0,  # a machine may stand still for some
        "patience_seconds": 120.0,
    }
    return StreamSettings(endpoint=endpoint, **(quick | changes))


def named_source(shards: int = SHARDS) -> NamedSource:
    """A source of activations that hold their own names: two windows, 16 tokens, in a chunk."""
    truth = SyntheticSettings(d_in=D_IN, features=8, shards=shards, shard_windows=WINDOWS)
    source = NamedSource(
        ProducerSettings(corpus=CorpusSettings(kind="synthetic", context=CONTEXT, held_out=0.0, synthetic=truth))
    )
    source.batch_windows = 2
    return source


def every_name(shards: int = SHARDS) -> list[Name]:
    return [(s, w, p) for s in range(shards) for w in range(WINDOWS) for p in range(CONTEXT)]


def hello_of(source: Source, dtype: str = "float32", **changes: Any) -> Hello:
    """The HELLO that `python -m producer` sends."""
    facts: dict[str, Any] = {
        "producer": uuid.uuid4().hex,
        "session": uuid.uuid4().hex,
        "name": "test",
        "fingerprint": fingerprint(source.facts),
        "shards": source.shards,
        "held_out": 0.0,
        "context": source.context,
        "hooks": source.hooks,
        "dtype": dtype,
        "chunk_rows": source.context * chunk_windows_of(source, dtype),
        "norm_bounds": None,
        "provenance": {},
    }
    return Hello(**(facts | changes))


# The trainer's end


def new_ledger(
    settings: StreamSettings, capacity: int = CAPACITY, epochs: int | None = 1, policy: CreditPolicy | None = None
) -> Ledger:
    limits = Limits(
        capacity=capacity,
        seed=0,
        epochs=epochs,
        heartbeat_seconds=settings.heartbeat_seconds,
        dead_seconds=settings.dead_seconds,
        stall_seconds=settings.stall_seconds,
    )
    return Ledger(limits, "run", uuid.uuid4().hex, [settings.endpoint], policy)


@contextmanager
def trainer(
    settings: StreamSettings,
    ledger: Ledger | None = None,
    capacity: int = CAPACITY,
    limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008 (frozen)
) -> Iterator[Intake]:
    """The trainer's end of the stream, without SAEs."""

    def make_buffer(hello: Hello) -> ShuffleBuffer:
        return ShuffleBuffer(capacity, [hook.width for hook in hello.hooks], TORCH_DTYPE[hello.dtype], 0)

    with Intake(settings, ledger or new_ledger(settings, capacity), make_buffer, limits=limits) as intake:
        yield intake


def train(intake: Intake, rows: int | None = None, batch: int = CHUNK_ROWS, seconds: float = 120) -> list[Name]:
    """Takes `rows` tokens, or all, marks them as trained, and returns their names in the order of training."""
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    names: list[Name] = []
    while (rows is None or len(names) < rows) and (next_batch := intake.take(batch, stop)) is not None:
        intake.mark_trained(next_batch)
        shard, window, position, one = (column.tolist() for column in next_batch.x[0][:, :4].int().T)
        assert set(one) == {1}
        assert next_batch.position.tolist() == [w * CONTEXT + p for w, p in zip(window, position, strict=True)]
        names += zip(shard, window, position, strict=True)
    timer.cancel()
    assert not stop.is_set(), f"{len(names)} tokens came in {seconds} s, then no more"
    return names


def finish(intake: Intake, *producers: Producing) -> list[Name]:
    """Trains on the rest of the stream, ends the run and its producers, and returns the names, sorted."""
    names = train(intake)
    intake.drain(finished=True)
    for producer in producers:
        assert producer.wait_for_end() is None
    return sorted(names)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits until `condition` holds, for at most so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


# The producer's end


class Producing:
    """The real Link and Producer in a thread, as in `python -m producer`; starts at once."""

    def __init__(
        self,
        settings: StreamSettings,
        source: Source | None = None,
        hello: Hello | None = None,
        on_report: Callable[[ProducerReport], None] = lambda report: None,
    ) -> None:
        source = source or named_source()
        self.link = Link(settings, hello or hello_of(source, settings.dtype))
        chunk_windows = chunk_windows_of(source, settings.dtype)
        self.producer = Producer(source, self.link, settings.dtype, chunk_windows, on_report)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.link:
                self.producer.run()
        except Exception as error:
            self._error = error

    @property
    def refusal(self) -> Exception | None:
        """The error that ended the producer, None while it runs."""
        return self._error

    def wait_for_end(self, seconds: float = 120) -> Exception | None:
        """Waits for the end and returns the error, None after a finished run."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the producer goes on"
        return self._error


class Peer:
    """A producer whose every message the test decides, valid or not."""

    def __init__(self, settings: StreamSettings, hello: Hello | None = None) -> None:
        self.source = named_source()
        self.hello = hello or hello_of(self.source, settings.dtype)
        self.leases: list[Lease] = []
        self.welcome: Welcome | None = None
        self.chunk_count = 0
        self._windows: dict[int, int] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        if settings.keys is not None:
            connect_encrypted(self._socket, settings.keys)
        self._socket.connect(settings.endpoint)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def join(self) -> Peer:
        """Opens a session, and waits for a lease and credit."""
        self.leases, self.chunk_count = [], 0
        self._windows.clear()
        self.send(self.hello)
        self.welcome = self.receive(Welcome)
        self.receive(Credit)  # the leases come before it
        return self

    def send(self, message: Message | bytes, payload: bytes | None = None) -> None:
        frames = [message if isinstance(message, bytes) else encode(message)]
        self.send_frames(*frames, *([] if payload is None else [payload]))

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self, kind: type[M], seconds: float = 60) -> M:
        """Returns the next message of this kind; collects leases and skips all others."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if isinstance(message := self._poll(), kind):
                return message
        raise AssertionError(f"no {kind.__name__} within {seconds} s")

    def _poll(self) -> Message | None:
        if not self._socket.poll(10):
            return None
        message = decode(self._socket.recv_multipart()[0])
        if isinstance(message, Lease):
            self.leases.append(message)
        return message

    def send_chunk(self, payload: bytes | None = None, lease: Lease | None = None, **changes: Any) -> Chunk:
        """Sends the next two windows of the first lease, with `changes` of the chunk's fields."""
        assert self.welcome is not None
        lease = lease or self.leases[0]
        first = self._windows.get(lease.shard, 0)
        self._windows[lease.shard] = first + 2
        self.chunk_count += 1
        fields: dict[str, Any] = {
            "number": self.chunk_count,
            "incarnation": self.welcome.incarnation,
            "shard": lease.shard,
            "epoch": lease.epoch,
            "attempt": lease.attempt,
            "first_window": first,
            "windows": 2,
            "rows": CHUNK_ROWS,
            "kept": pack_bits(np.ones(CHUNK_ROWS, bool)),
            "outliers": b"",
        }
        message = Chunk(**(fields | changes))
        self.send(message, self.payload_of(lease.shard, first) if payload is None else payload)
        return message

    def payload_of(self, shard: int, first_window: int) -> bytes:
        """Payload of two windows of the corpus."""
        windows = self.source.windows(shard)
        (x,) = self.source.activations(shard, windows, np.arange(first_window, first_window + 2))
        return x.to(TORCH_DTYPE[self.hello.dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()

    def leave(self) -> None:
        self.send(Bye())


class Tunnel:
    """A TCP proxy before `endpoint` that records the traffic, and can break or block connections."""

    def __init__(self, endpoint: str) -> None:
        self.traffic = bytearray()
        self.is_open = threading.Event()
        self.is_open.set()
        self._port = int(endpoint.rsplit(":", 1)[1])
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.endpoint = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Tunnel:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.is_open.set()
        self.break_connections()

    def break_connections(self) -> None:
        """Breaks every connection through the tunnel; new ones can be made."""
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                ends = self._server.accept()[0], socket.create_connection(("127.0.0.1", self._port))
                self._sockets += ends
                for source, sink in (ends, ends[::-1]):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.is_open.wait()
                self.traffic += data
                sink.sendall(data)
        for end in (source, sink):
            end.close()
