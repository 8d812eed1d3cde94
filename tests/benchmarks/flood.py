"""A flood of clients beside a training run: what it does to the trainer's steps.

The demo's trainer and producer at work, on all cores, with a real monitor beside them. Fifty clients ask in a loop, as
fast as they are answered: the page, the run, the snapshots, the metrics, and the weights in full. They are stopped and
let go by turns within one run, so that both sides see the same machine, the same SAE and the same noise; the times are
those of every single step, taken in the trainer's process.

The clients are a process of the lowest priority on the same machine, since they stand for others elsewhere: what they
were given is told, so that one sees that there was a flood.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from monitor.cli.client import Monitor
from monitor.cli.errors import MonitorError
from monitor.run_directory import last_report
from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.producer import RUN_FILE
from tests.benchmarks.together import demo_overrides

CLIENTS = 50
TURN_SECONDS = 5.0
TURNS = 4
"""Of quiet and of flood each, in one round."""
SETTLE_SECONDS = 1.0
"""After each change, before steps count: what the service has saved up is spent by then."""
WARM_TOKENS = 300_000
BATCH = 512
"""Short steps, of which there are enough for a 99th percentile."""
QUIET, FLOODED = "alone", f"{CLIENTS} clients in a loop"


def run(options: Options) -> Iterator[Result]:
    turns, warm = (1, WARM_TOKENS // 10) if options.quick else (TURNS, WARM_TOKENS)
    p99, p50, speed = (
        Result(f"Step beside a flood, {what}", unit)
        for what, unit in (("99th percentile", "ms"), ("median", "ms"), ("training", "tokens/s"))
    )
    with _training(options.device, warm) as (url, steps_file), _Clients(url) as clients:
        with clients.asking():
            _turn()  # what the service has saved up is spent once
        for _ in range(options.rounds):
            spans: dict[str, list[tuple[float, float]]] = {QUIET: [], FLOODED: []}
            for _ in range(turns):
                spans[QUIET].append(_turn())
                with clients.asking():
                    spans[FLOODED].append(_turn())
            steps = np.fromfile(steps_file).reshape(-1, 2)
            for name, turn in spans.items():
                seconds = np.concatenate([_within(steps, *span) for span in turn])
                p99.measured.setdefault(name, []).append(1e3 * float(np.percentile(seconds, 99)))
                p50.measured.setdefault(name, []).append(1e3 * float(np.median(seconds)))
                speed.measured.setdefault(name, []).append(BATCH * len(seconds) / sum(b - a for a, b in turn))
        answers, megabytes, seconds = clients.leave()
    p99.figures = [Figure("flooded / alone", p99.ratio(FLOODED, QUIET), 1.05)]
    p50.figures = [Figure("flooded / alone", p50.ratio(FLOODED, QUIET))]
    speed.figures = [Figure("flooded / alone", speed.ratio(FLOODED, QUIET))]
    p99.notes = [
        f"the clients were given {answers / seconds:,.0f} answers and {megabytes / seconds:,.0f} MB each second",
        f"{len(steps):,} steps of {BATCH} rows in all; {os.cpu_count()} cores",
    ]
    yield from (p99, p50, speed)


def _turn() -> tuple[float, float]:
    """(from, to) of a stretch of time, the monotonic clock's."""
    time.sleep(SETTLE_SECONDS)
    began = time.monotonic()
    time.sleep(TURN_SECONDS)
    return began, time.monotonic()


def _within(steps: np.ndarray, start: float, end: float) -> np.ndarray:
    """Seconds of the steps that ended in that time; `steps` are (end, seconds)."""
    return steps[(steps[:, 0] >= start) & (steps[:, 0] < end), 1]


@contextmanager
def _training(device: str, warm: int) -> Iterator[tuple[str, Path]]:
    """(the monitor's address, file of step times) of the demo once it has trained `warm` tokens."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        overrides = [
            *demo_overrides(folder, device),
            f"optimizer.batch={BATCH}",
            f"run.threads={max(1, (os.cpu_count() or 1) // 2)}",
            "snapshots.every_tokens=1_000_000_000",
            "checkpoint.every_seconds=100_000.0",
            "monitor.port=0",
            f"monitor.service_port={port}",
            "monitor.evaluate=false",
        ]
        directory, steps = folder / "run", folder / "steps"
        for command in (
            ["tests.benchmarks.flood", "train", str(steps)],
            ["producer"],
            ["monitor"],
        ):
            stack.enter_context(_process([sys.executable, "-m", *command, RUN_FILE, *overrides]))
        while (report := last_report(directory)) is None or report["tokens"] < warm:
            time.sleep(0.1)
        ctl = [sys.executable, "-m", "trainer", "ctl", str(directory), "snapshot"]
        subprocess.run(ctl, check=True, stdout=subprocess.DEVNULL)
        yield f"http://127.0.0.1:{port}", steps


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def train(steps: Path, arguments: list[str]) -> int:
    """The trainer as it is, with each step's end and seconds appended to a file."""
    from trainer.__main__ import main
    from trainer.training.run import Run

    train_step, file = Run.train_step, open(steps, "wb", buffering=0)  # noqa: SIM115 (open as long as the process)

    def timed(self: Run, batch: Any) -> None:
        began = time.monotonic()
        train_step(self, batch)
        end = time.monotonic()
        file.write(np.array([end, end - began]).tobytes())

    Run.train_step = timed  # type: ignore[method-assign]
    return main(arguments)


# --- The clients -----------------------------------------------------------------------------------------------------


class _Clients:
    """A process of clients, stopped but where it is asked to go on."""

    def __init__(self, url: str) -> None:
        self._stack = ExitStack()
        self._seconds = 0.0
        self._url = url

    def __enter__(self) -> _Clients:
        weights = self._wait_for_weights()
        command = [sys.executable, "-m", "tests.benchmarks.flood", "ask", self._url, weights]
        self._process = self._stack.enter_context(_process(command))
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it is ready, and waits
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait_for_weights(self) -> str:
        monitor = Monitor(self._url)
        while True:
            with suppress(MonitorError, ConnectionError):
                manifest = monitor.read("/v1/snapshots/latest") or {}
                path = next(entry["path"] for entry in manifest["files"] if "weights" in entry["path"])
                return f"/v1/snapshots/{manifest['name']}/{path}"
            time.sleep(0.1)

    @contextmanager
    def asking(self) -> Iterator[None]:
        began = time.monotonic()
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)
            self._seconds += time.monotonic() - began

    def leave(self) -> tuple[int, float, float]:
        """(answers, megabytes, seconds of asking)"""
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdout is not None
        counts = json.loads(self._process.stdout.readline())
        return counts["answers"], counts["bytes"] / 1e6, self._seconds


async def _ask_for_ever(host: str, port: int, paths: list[str], counts: dict[str, int]) -> None:
    """One client: a connection for each request, read to its end."""
    while True:
        for path in paths:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                head = await reader.readline()
                while piece := await reader.read(1 << 18):
                    counts["bytes"] += len(piece)
                counts["answers"] += b" 200 " in head
                writer.close()


async def _ask(url: str, weights: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    paths, counts = (
        ["/", "/v1/run", "/v1/snapshots", "/v1/snapshots/latest", "/metrics", weights],
        {"answers": 0, "bytes": 0},
    )
    clients = [
        asyncio.create_task(_ask_for_ever(host, int(port), paths[turn:] + paths[:turn], counts))
        for turn in (number % len(paths) for number in range(CLIENTS))
    ]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    for client in clients:
        client.cancel()
    print(json.dumps(counts), flush=True)


def _main(what: str, *arguments: str) -> int:
    if what == "train":
        return train(Path(arguments[0]), list(arguments[1:]))
    os.nice(19)
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    asyncio.run(_ask(*arguments))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
