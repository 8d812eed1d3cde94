"""Rows through the real link and intake, beside frames of the same size through bare sockets; what intake costs a step.

Sluice   producer.link → trainer.stream.intake: headers, credit, leases, checks, and the copy into the buffer. Rows are
         taken out without being read: reading them belongs to the buffer's section.
bare     DEALER → ROUTER of pyzmq, header and payload of the same size, without copies; dropped on arrival.

Each sender is a process of its own that rests while it is not its turn, because nobody takes what it sends.
"""

from __future__ import annotations

import os
import socket as sockets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import zmq

from producer.keys import serve_encrypted, write_keys
from producer.settings import StreamSettings
from tests.benchmarks.measure import Figure, Options, Result, seconds_once
from tests.benchmarks.sending import chunk_rows
from tests.benchmarks.subject import HOOK, Size, correlated_rows, sae_trainer
from trainer.stream.buffer import Batch, ShuffleBuffer
from trainer.stream.intake import Intake
from trainer.stream.ledger.ledger import Ledger, Limits

WIDTH = 1024
SECONDS, SETTLING_SECONDS = 2.0, 0.5
STEP = Size(d_in=256, d_sae=4096, k=32, batch=2048)
"""The demo's: small steps and narrow rows, so that much of the time is Python's, which one lock guards."""
STEPS = 40
WAYS = {"ipc": False, "tcp": False, "ipc, CURVE": True, "tcp, CURVE": True}


def run(options: Options) -> Iterator[Result]:
    yield _rates(options)
    yield _cost(options)


def _rates(options: Options) -> Result:
    seconds = 0.5 if options.quick else SECONDS
    size = 2 * WIDTH * chunk_rows(WIDTH) / 2**20
    result = Result(f"Wire, chunks of {size:.1f} MiB", "MB/s")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_keys(folder / "keys")
        contenders: dict[str, Callable[[], float]] = {}
        for way, encrypted in WAYS.items():
            keys = str(folder / "keys") if encrypted else None
            for name, kind in (("Sluice", Taking), ("bare sockets", Receiving)):
                end = stack.enter_context(kind(_endpoint(way, folder / f"{name}-{way}"), keys, WIDTH))
                contenders[f"{name}, {way}"] = partial(end.rate, seconds)
        result.take_turns(options.rounds, contenders)
    result.figures = [
        Figure(
            f"wire / bare sockets, {way}", result.ratio(f"Sluice, {way}", f"bare sockets, {way}"), 0.8, at_least=True
        )
        for way in WAYS
    ]
    return result


def _cost(options: Options) -> Result:
    """Step time while rows come in as fast as steps use them up, and while none come."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    result = Result(f"A step beside a busy intake: {STEP}, on {max(1, cores - 1)} of {cores} cores", "ms")
    torch.set_num_threads(max(1, cores - 1))
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = correlated_rows(STEP.batch, STEP.d_in)
            learner = sae_trainer("topk", STEP, "cpu", rows)
            with Taking(f"ipc://{folder}/stream", None, STEP.d_in, ShuffleBuffer) as busy:

                def beside_intake() -> float:
                    return 1e3 * float(np.median([_step_on(busy.take()) for _ in range(STEPS)]))

                def alone() -> float:
                    batch = busy.take()
                    time.sleep(0.3)  # the buffer is full by then, and the sender rests
                    return 1e3 * float(np.median([_step_on(batch) for _ in range(STEPS)]))

                def _step_on(batch: Batch) -> float:
                    x = batch.x[0].float()
                    return seconds_once(lambda: learner.step({HOOK: x}))

                beside_intake()
                result.take_turns(options.rounds, {"intake busy": beside_intake, "intake idle": alone})
    finally:
        torch.set_num_threads(threads)
    result.figures = [Figure("step, intake busy / idle", result.ratio("intake busy", "intake idle"), 1.05)]
    return result


class Unread(ShuffleBuffer):
    """Rows are copied in as always; taken out are only their names."""

    def _gather(self, slots: np.ndarray) -> Batch:
        return Batch([], self._serial[slots], self._position[slots])


class _End:
    """A receiving end and the process that sends to it."""

    how: str

    def __init__(self, endpoint: str, keys: str | None, width: int) -> None:
        self._sender = [sys.executable, "-m", "tests.benchmarks.sending", self.how, endpoint, keys or "-", str(width)]

    def __enter__(self):  # type: ignore[no-untyped-def]
        self._process = subprocess.Popen(self._sender, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def check(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"the sender ended with code {self._process.returncode}")


class Taking(_End):
    """The real intake, and a training thread that only takes."""

    how = "link"
    batch = 2048

    def __init__(
        self, endpoint: str, keys: str | None, width: int, buffer: type[ShuffleBuffer] = Unread, capacity: int = 65_536
    ) -> None:
        super().__init__(endpoint, keys, width)
        self._ledger = Ledger(Limits(capacity, 0, None, 1.0, 60.0, 600.0), "bench", "bench", [endpoint])
        settings = StreamSettings(endpoint=endpoint, keys=keys, dead_seconds=60.0)
        self._intake = Intake(settings, self._ledger, lambda hello: buffer(capacity, [width], torch.bfloat16, 0))
        self._stop = threading.Event()
        self._row_bytes = 2 * width

    def __enter__(self) -> Taking:
        self._intake.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:  # type: ignore[no-untyped-def]
        super().__exit__(*error)
        self._intake.__exit__()

    def rate(self, seconds: float) -> float:
        """MB/s that arrive while rows are taken as they come."""
        for seconds in (SETTLING_SECONDS, seconds):  # noqa: B020
            self.take()
            rows, began = self._ledger.tokens_received, time.perf_counter()
            while time.perf_counter() - began < seconds:
                self.take()
        rate = (self._ledger.tokens_received - rows) / (time.perf_counter() - began)
        return rate * self._row_bytes / 1e6

    def take(self) -> Batch:
        while not self._intake.wait_until_ready(self.batch, self._stop, 1.0):
            self.check()
        batch = self._intake.take(self.batch, self._stop)
        assert batch is not None
        self._intake.mark_trained(batch)
        return batch


class Receiving(_End):
    """A bare ROUTER socket."""

    how = "bare"

    def __init__(self, endpoint: str, keys: str | None, width: int) -> None:
        super().__init__(endpoint, keys, width)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.rcvhwm, self._socket.linger = 64, 0
        self._authenticator = None if keys is None else serve_encrypted(self._context, self._socket, keys)[0]
        self._socket.bind(endpoint)

    def __exit__(self, *error) -> None:  # type: ignore[no-untyped-def]
        super().__exit__(*error)
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def rate(self, seconds: float) -> float:
        """MB/s of payload."""
        for seconds in (SETTLING_SECONDS, seconds):  # noqa: B020
            self._receive()
            size, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                size += self._receive()
        return size / (time.perf_counter() - began) / 1e6

    def _receive(self) -> int:
        while not self._socket.poll(1000):
            self.check()
        return len(self._socket.recv_multipart(copy=False)[-1].buffer)


def _endpoint(way: str, path: Path) -> str:
    if way.startswith("ipc"):
        return f"ipc://{path}"
    with sockets.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"
