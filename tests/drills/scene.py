"""What the drills share: a run on the synthetic source as real processes, and the judgement of what it trained.

A token's content is its name, and the recording trainer writes down every token that it trains on: after a drill the
surviving lineage is compared with the corpus, token by token.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from producer.wire import held_out_shards
from trainer.snapshot import snapshot_names, verify
from trainer.state.checkpoint import load_newest

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
SHARDS, WINDOWS, CONTEXT, HELD_OUT = 32, 64, 32, 0.0625
CAPACITY = 16_384
"""Of the buffer, in rows; half a million bytes at this width."""
SAMPLE_SECONDS = 0.1

RUN = f"""
[run]
directory = "DIR/run"
threads = 1
[stream]
endpoint = "ipc://DIR/stream"
dtype = "float32"
heartbeat_seconds = 0.25
dead_seconds = 2.0
stall_seconds = 20.0
patience_seconds = 120.0
[corpus]
kind = "synthetic"
context = {CONTEXT}
held_out = {HELD_OUT}
outlier_factor = 1e6
[corpus.synthetic]
d_in = 8
features = 16
shards = {SHARDS}
shard_windows = {WINDOWS}
[buffer]
rows = {CAPACITY}
[optimizer]
batch = 256
matmul = "float32"
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 32
k = 4
[snapshots]
every_tokens = 50000
keep = 2
[checkpoint]
every_seconds = 1.0
[monitor]
trainer_port = 0
producer_port = 0
"""

TRAINING_SHARDS = np.setdiff1d(np.arange(SHARDS), held_out_shards(SHARDS, HELD_OUT))
EPOCH_ROWS = len(TRAINING_SHARDS) * WINDOWS * CONTEXT


@dataclass
class Outcome:
    """What a drill has shown. It has raised AssertionError if the promise was broken."""

    rounds: int
    """How often the fault was caused."""
    rows: int = 0
    """Trained rows whose names were checked."""
    lost: int = 0
    repeated: int = 0
    recovery: float | None = None
    """Longest stretch without a trained row, from the first to the last, in seconds."""
    peak_mb: float | None = None
    """Largest resident memory of a trainer at any sample."""
    note: str = ""
    details: dict[str, str] = field(default_factory=dict)
    """A table of its own: what was done, and what came of it."""


@dataclass(frozen=True)
class Sample:
    """One look at the processes."""

    at: float
    trained_bytes: int
    """Length of the file of trained rows."""
    trainer_mb: float
    producer_mb: float
    """Of the largest producer."""
    descriptors: int
    threads: int
    """Both of the trainer."""


class Scene:
    """A run directory, the processes at work on it, and samples of them. Leaves no process behind."""

    def __init__(self, folder: Path, *overrides: str, run: str = RUN) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run = folder, folder / "run"
        self.rows_file = folder / "rows"
        self.samples: list[Sample] = []
        self._overrides = list(overrides)
        self._run_file = folder / "run.toml"
        self._run_file.write_text(run.replace("DIR", str(folder)))
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Scene:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._sampler.join()
        for _, process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    # Processes

    def trainer(self, *overrides: str, **environment: Any) -> subprocess.Popen[bytes]:
        """The recording trainer; `environment` as its docstring tells."""
        return self._start("trainer", [str(HERE / "recording_trainer.py"), str(self.rows_file)], overrides, environment)

    def torchrun(self, ranks: int, *overrides: str, **environment: Any) -> subprocess.Popen[bytes]:
        """The recording trainer on several ranks: torchrun's agent, whose children they are."""
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [str(HERE / "recording_trainer.py"), str(self.rows_file)]
        return self._start("torchrun", [*command, *program], overrides, environment)

    def producer(self, *overrides: str) -> subprocess.Popen[bytes]:
        return self._start("producer", [str(HERE / "named_producer.py")], overrides, {})

    def monitor(self, *overrides: str) -> subprocess.Popen[bytes]:
        return self._start("monitor", ["-m", "monitor"], overrides, {})

    def program(self, name: str, *overrides: str, **environment: Any) -> subprocess.Popen[bytes]:
        """A program beside this file, which stands for a producer or monitor with a fault."""
        return self._start(name, [str(HERE / f"{name}.py")], overrides, environment)

    def _start(
        self, what: str, command: list[str], overrides: tuple[str, ...], environment: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        settings = {key: str(value) for key, value in environment.items()}
        with open(self.folder / f"{what}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, str(self._run_file), *self._overrides, *overrides],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=_environment() | settings,
            )
        self._processes.append((what, process))
        return process

    def log(self, what: str = "trainer") -> str:
        path = self.folder / f"{what}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # What happens

    @property
    def trained_rows(self) -> int:
        """Tokens recorded so far, including those of a crashed trainer until the next one truncates the file."""
        return self.rows_file.stat().st_size // 12 if self.rows_file.exists() else 0

    def wait(self, condition: Callable[[], object], seconds: float = 90.0, what: str = "") -> float:
        """Waits until the condition holds; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"waited {seconds:g} s in vain {what}"
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_for_rows(self, rows: int, seconds: float = 90.0) -> None:
        self.wait(lambda: self.trained_rows >= rows, seconds, f"for {rows:,} rows; there are {self.trained_rows:,}")

    # Judgement

    def outcome(
        self, rounds: int, epochs: int, quarantined: set[int] | frozenset[int] = frozenset(), note: str = ""
    ) -> Outcome:
        """Raises AssertionError unless each token of each shard but those `quarantined` was trained once per epoch."""
        shard, window, position = np.fromfile(self.rows_file, np.int32).reshape(-1, 3).T
        counts = np.bincount((shard * WINDOWS + window) * CONTEXT + position, minlength=SHARDS * WINDOWS * CONTEXT)
        expected = np.zeros_like(counts).reshape(SHARDS, -1)
        expected[np.setdiff1d(TRAINING_SHARDS, list(quarantined))] = epochs
        difference = counts - expected.reshape(-1)
        outcome = Outcome(
            rounds,
            len(shard),
            lost=-int(difference[difference < 0].sum()),
            repeated=int(difference[difference > 0].sum()),
            recovery=self.longest_standstill(),
            peak_mb=max((sample.trainer_mb for sample in self.samples), default=None),
            note=note,
        )
        assert not outcome.lost and not outcome.repeated, f"{outcome.lost} rows lost, {outcome.repeated} trained twice"
        self.judge_logs()
        self.judge_files()
        return outcome

    def judge_logs(self) -> None:
        """Fails if an invariant was broken or a process ended in a traceback."""
        assert "an invariant is broken" not in self.log() + self.log("torchrun")
        assert "a command of rank 0 failed" not in self.log("torchrun")
        for what in ("trainer", "producer"):
            assert "Traceback" not in self.log(what), f"{what}: {self.log(what)[-2000:]}"

    def judge_files(self) -> None:
        """Fails unless the newest checkpoint loads, every snapshot has its hashes and no temporary folder is left."""
        assert load_newest(self.run) is not None
        for name in snapshot_names(self.run):
            verify(self.run / "snapshots" / name)
        assert not list(self.run.glob("*/.tmp-*")), "a temporary folder was left"

    def longest_standstill(self) -> float | None:
        """In seconds, of the trained tokens, from the first to the last."""
        grown = [self.samples[0]] if self.samples else []
        for sample in self.samples:
            if sample.trained_bytes != grown[-1].trained_bytes:
                grown.append(sample)
        times = [sample.at for sample in grown if sample.trained_bytes]
        return max((after - before for before, after in pairwise(times)), default=None)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            looks = [(what, _look(process.pid)) for what, process in list(self._processes) if process.poll() is None]
            trainers = [look for what, look in looks if what == "trainer" and look]
            producers = [look for what, look in looks if what == "producer" and look]
            self.samples.append(
                Sample(
                    time.monotonic(),
                    12 * self.trained_rows,
                    max((look[0] for look in trainers), default=0.0),
                    max((look[0] for look in producers), default=0.0),
                    max((look[1] for look in trainers), default=0),
                    max((look[2] for look in trainers), default=0),
                )
            )


def _look(pid: int) -> tuple[float, int, int] | None:
    """(resident megabytes, file descriptors, threads) of a process; None when it is gone."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        with process.oneshot():
            return process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()
    return None


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):  # type: ignore[no-untyped-def]
    """A file system of its own at `folder`, of that size; unmounted afterwards. Needs root: PermissionError without."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "sluice-drill", str(folder)], capture_output=True
    )
    if mounted.returncode:
        raise PermissionError(f"a file system of {megabytes} MB cannot be mounted here: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], capture_output=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)
