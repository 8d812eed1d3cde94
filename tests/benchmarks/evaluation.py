"""What evaluating snapshots costs the training beside it: the demo's step rate with and without it.

The demo's trainer and producer at work, on all cores, and real monitors that each have a snapshot to measure: one at
all the speed that low priority leaves it (share 1), others keeping to a share of the time. They are held and let go by
short turns within one run, so that all meet the same machine, the same SAEs and the same noise. Each has so much
held-out text that it is still at it at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from monitor.run_directory import last_report
from monitor.settings import MonitorTable
from producer.common.run_file import read_run_file
from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.producer import RUN_FILE
from tests.benchmarks.together import demo_overrides
from trainer.settings import TrainerSettings

TURN_SECONDS = 4.0
TURNS = 8
"""Of each contender, in one round."""
SETTLE_SECONDS = 1.5
"""After each change, before steps count: the pass that was under way is over by then."""
WARM_TOKENS = 300_000
WITHOUT = "without evaluation"
DEFAULT = MonitorTable().evaluation_share
SHARES = sorted({1.0, DEFAULT, 0.1}, reverse=True)


def run(options: Options) -> Iterator[Result]:
    turns, warm = (1, WARM_TOKENS // 10) if options.quick else (TURNS, WARM_TOKENS)
    speed = Result("Training beside an evaluation", "tokens/s")
    with _training(options.device, warm) as (folder, overrides, steps_file), ExitStack() as stack:
        batch = read_run_file(TrainerSettings, RUN_FILE, overrides).optimizer.batch
        contenders: dict[str, _Monitor | None] = {WITHOUT: None}
        for share in SHARES:
            contenders[_name(share)] = stack.enter_context(_Monitor(folder / f"{share}", share, overrides))
        for _ in range(options.rounds):
            spans: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            for turn in range(turns):
                order = list(contenders)
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    spans[name].append(_turn(contenders[name]))
            ends = np.fromfile(steps_file).reshape(-1, 2)[:, 0]
            for name, of_name in spans.items():
                steps = sum(int(((ends >= start) & (ends < end)).sum()) for start, end in of_name)
                seconds = sum(end - start for start, end in of_name)
                speed.measured.setdefault(name, []).append(batch * steps / seconds)
        if any((folder / "run").glob("snapshots/*/*/evaluation.json")):
            raise RuntimeError("an evaluation was done before the end: there is too little held-out text")
        for name, monitor in contenders.items():
            if monitor is not None:
                speed.notes.append(f"{name}: the monitor used {monitor.cores():.2f} of a core in its turns")
    for share in SHARES:
        # One thread for this share of the time: all that the setting lets it take from the training.
        goal = 1 - share / (os.cpu_count() or 1)
        speed.figures.append(
            Figure(f"share {share:g} / without", speed.ratio(_name(share), WITHOUT), goal, at_least=True)
        )
    yield speed


def _name(share: float) -> str:
    return f"monitor.evaluation_share = {share:g}"


def _turn(monitor: _Monitor | None) -> tuple[float, float]:
    """(from, to) of a stretch of time in which this monitor evaluates, the monotonic clock's."""
    with monitor.evaluating() if monitor else ExitStack():
        time.sleep(SETTLE_SECONDS)
        began = time.monotonic()
        time.sleep(TURN_SECONDS)
        return began, time.monotonic()


@contextmanager
def _training(device: str, warm: int) -> Iterator[tuple[Path, list[str], Path]]:
    """(folder, overrides, file of step times) of the demo once it has trained `warm` tokens and has a snapshot."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps = folder / "steps"
        overrides = demo_overrides(folder, device)
        overrides += ["snapshots.every_tokens=1_000_000_000", "checkpoint.every_seconds=100_000.0"]
        for command in (["tests.benchmarks.flood", "train", str(steps)], ["producer"]):
            stack.enter_context(_process([sys.executable, "-m", *command, RUN_FILE, *overrides], subprocess.DEVNULL))
        while (report := last_report(folder / "run")) is None or report["tokens"] < warm:
            time.sleep(0.1)
        ctl = [sys.executable, "-m", "trainer", "ctl", str(folder / "run"), "snapshot"]
        subprocess.run(ctl, check=True, stdout=subprocess.DEVNULL)
        yield folder, overrides, steps


class _Monitor:
    """A monitor that evaluates while its gate, a file, is there."""

    def __init__(self, gate: Path, share: float, overrides: list[str]) -> None:
        self._gate, self._stack = gate, ExitStack()
        options = [f"monitor.evaluation_share={share}", "monitor.port=0", "monitor.service_port=0"]
        options += ["monitor.evaluation_tokens=100_000_000"]
        module = ["tests.benchmarks.evaluation", str(gate)]
        self._command = [sys.executable, "-m", *module, RUN_FILE, *overrides, *options]
        self._seconds = self._busy = 0.0

    def __enter__(self) -> _Monitor:
        process = self._stack.enter_context(_process(self._command, subprocess.PIPE))
        assert process.stderr is not None
        if not any("evaluating with" in line for line in process.stderr):
            raise RuntimeError("the monitor ended")
        self._process = psutil.Process(process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        began, busy = time.monotonic(), sum(self._process.cpu_times()[:2])
        self._gate.touch()
        try:
            yield
        finally:
            self._gate.unlink()
            self._seconds += time.monotonic() - began
            self._busy += sum(self._process.cpu_times()[:2]) - busy

    def cores(self) -> float:
        """The share of a core that it used while it was let go."""
        return self._busy / self._seconds


@contextmanager
def _process(command: list[str], stderr: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def monitor(gate: Path, arguments: list[str]) -> int:
    """The monitor as it is, but that it waits at its gate after each piece of work."""
    from monitor.__main__ import main
    from monitor.evaluation.follow import Evaluator

    between = Evaluator._between

    def gated(self: Any) -> None:
        if gate.exists():
            between(self)
        while not gate.exists():
            time.sleep(0.05)
            self.moved_at = time.monotonic()

    Evaluator._between = gated  # type: ignore[method-assign]
    return main(arguments)


if __name__ == "__main__":
    sys.exit(monitor(Path(sys.argv[1]), sys.argv[2:]))
