"""Signals and limits of the three daemons: whatever ends them ends them cleanly, and in words."""

from __future__ import annotations

import errno
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zmq

from producer.common.process import STOPPING, run_within_limits
from tests.drills.scene import Scene
from trainer.state.checkpoint import load_newest

ROOT = Path(__file__).parent.parent

WAITING = """
import logging, sys, threading
from pathlib import Path
from producer.common.process import stop_on_signals

stop = threading.Event()
stop_on_signals(stop.set)
Path(sys.argv[1]).write_text("ready")
for _ in range(2400):
    logging.warning("a line for whoever reads")
    if stop.wait(0.05):
        Path(sys.argv[1]).write_text("left")
        break
"""


def start(file: Path, *before: str, **how: object) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([*before, sys.executable, "-c", WAITING, str(file)], cwd=ROOT, **how)  # type: ignore[call-overload]
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text() != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_every_signal_that_ends_a_process_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """Also when whoever read its log is gone."""
    process = start(tmp_path / "file", stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    time.sleep(0.1)
    process.send_signal(number)

    assert process.wait(120) == 0 and (tmp_path / "file").read_text() == "left"


def test_a_terminal_that_closes_ends_it_cleanly(tmp_path: Path) -> None:
    """SIGHUP comes, and standard error can no longer be written to."""
    here, there = pty.openpty()
    how = {"stdin": there, "stdout": there, "stderr": there, "start_new_session": True}
    process = start(tmp_path / "file", "setsid", "--ctty", "--wait", **how)
    os.close(there)
    os.close(here)

    process.wait(120)
    deadline = time.monotonic() + 60
    while (tmp_path / "file").read_text() != "left":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nohup_is_obeyed(tmp_path: Path) -> None:
    """What was started to outlive its terminal does; SIGTERM still ends it."""
    process = start(
        tmp_path / "file", "nohup", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and (tmp_path / "file").read_text() == "ready"
    process.terminate()

    assert process.wait(120) == 0 and (tmp_path / "file").read_text() == "left"


@pytest.mark.long
def test_a_trainer_and_a_producer_leave_on_signals_that_used_to_kill_them(tmp_path: Path) -> None:
    """SIGHUP without keys writes a checkpoint; SIGUSR2 gives a producer's leases back; the same commands finish."""
    with Scene(tmp_path, "checkpoint.every_seconds=1000.0") as scene:
        trainer, producer = scene.trainer(SECONDS_PER_STEP=0.01), scene.producer()
        scene.wait_for_rows(3000)
        trainer.send_signal(signal.SIGHUP)
        assert trainer.wait(120) == 0
        saved = load_newest(scene.run)
        assert saved is not None and saved.document.ledger.rows_trained == scene.trained_rows >= 3000
        producer.send_signal(signal.SIGUSR2)
        assert producer.wait(120) == 0
        trainer, _ = scene.trainer(), scene.producer()
        assert trainer.wait(120) == 0
        scene.outcome(1, 1)


SHORT = [
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
    zmq.ZMQError(errno.EMFILE),
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError(errno.EFBIG, "File too large"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_what_the_system_refuses_is_a_sentence(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """In the main thread and in another; with the limits that apply."""

    def fail() -> int:
        raise error

    def in_a_thread() -> int:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return 0

    log = logging.getLogger("test")
    assert run_within_limits(log, fail) == 1 and run_within_limits(log, in_a_thread) == 0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0].startswith("the system refuses a resource: ") and "open files (ulimit -n) " in lines[0]


def test_any_other_error_stays_one() -> None:
    """A fault of ours is not taken for a shortage."""
    with pytest.raises(KeyError):
        run_within_limits(logging.getLogger("test"), lambda: {}["x"])


def test_a_trainer_with_too_few_files_says_so(tmp_path: Path) -> None:
    """`ulimit -n 12`: exit code 1, one sentence, no traceback."""
    with Scene(tmp_path) as scene:
        file = tmp_path / "run.toml"
        command = ["bash", "-c", f"ulimit -n 12; exec {sys.executable} -m trainer {file}"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert not scene.trained_rows

    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "open files (ulimit -n) 12: sockets and libraries need 128 at least" in process.stderr
