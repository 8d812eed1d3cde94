"""Trainers and producers as real processes, on a run file in a temporary folder; all of them end with the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "trainer": ["tests/drills/recording_trainer.py"],
    "producer": ["tests/drills/named_producer.py"],
    "unnamed_producer": ["-m", "producer"],
}
"""A trainer that records the names of what it trains on, and producers of named or of synthetic activations."""

Start = Callable[..., subprocess.Popen[bytes]]


@contextmanager
def small_processes(folder: Path, **environment: str) -> Iterator[Start]:
    """Yields start(program, *overrides, ranks=1) for `folder`/run.toml; the trainer records to `folder`/rows.

    More than one rank is started by torchrun. Each program's output is appended to `folder`/PROGRAM.log.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def start(program: str, *overrides: str, ranks: int = 1) -> subprocess.Popen[bytes]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        recording = [str(folder / "rows")] if program == "trainer" else []
        with open(folder / f"{program}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *torchrun, *PROGRAMS[program], *recording, str(folder / "run.toml"), *overrides],
                cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment,
            )  # fmt: skip
        processes.append(process)
        return process

    try:
        yield start
    finally:
        for process in processes:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)  # ranks outlive torchrun for a moment
                for each in [*children, process]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits until `condition` holds, for at most so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def tokens_in_checkpoint(folder: Path) -> int:
    """Tokens of the newest checkpoint of `folder`/run, 0 without one."""
    folders = sorted((folder / "run" / "checkpoint").glob("[0-9]*"), key=lambda path: path.name.split("-")[1])
    return int(folders[-1].name.split("-")[0]) if folders else 0
