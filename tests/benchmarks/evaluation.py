"""What evaluating snapshots costs the training beside it: the demo's tokens per second with and without it.

The demo's trainer and producer at work, on all cores, and a real monitor that has a snapshot to measure. The monitors
take turns within one run, so that all meet the same machine and the same SAEs: one that does not evaluate, and some
that do, at all the speed that low priority leaves them (share 1) or keeping to a share of the time. Each has so much
held-out text that it is still at it when its turn ends.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from monitor.run_directory import last_report
from monitor.settings import MonitorTable
from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.producer import RUN_FILE
from tests.benchmarks.together import demo_overrides, start

SECONDS = 15.0
SETTLE_SECONDS = 2.0
WARM_TOKENS = 300_000
WITHOUT = "without evaluation"
DEFAULT = MonitorTable().evaluation_share
SHARES = sorted({1.0, DEFAULT, 0.1}, reverse=True)


def run(options: Options) -> Iterator[Result]:
    seconds = 3.0 if options.quick else SECONDS
    result, used = Result("Training beside an evaluation", "tokens/s"), dict[float, list[float]]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        overrides = demo_overrides(folder, options.device)
        overrides += ["snapshots.every_tokens=1_000_000_000", "checkpoint.every_seconds=100_000.0"]
        for program in ("trainer", "producer"):
            stack.enter_context(_ended(start(program, overrides)))
        _publish(folder / "run", WARM_TOKENS // 10 if options.quick else WARM_TOKENS)
        contenders = {WITHOUT: partial(_rate, folder / "run", overrides, seconds, None, used)}
        contenders |= {
            _name(share): partial(_rate, folder / "run", overrides, seconds, share, used) for share in SHARES
        }
        result.take_turns(options.rounds, contenders)
    for share in SHARES:
        goal = 0.95 if share == DEFAULT else None
        what = f"{_name(share)} / without"
        result.figures.append(Figure(what, result.ratio(_name(share), WITHOUT), goal, at_least=True))
    for share, cores in used.items():
        result.notes.append(f"{_name(share)}: the monitor used {median(cores):.2f} of a core")
    yield result


def _name(share: float) -> str:
    return f"monitor.evaluation_share = {share:g}"


def _publish(directory: Path, warm: int) -> None:
    """Has the trainer publish a snapshot once it has trained so many tokens."""
    while (report := last_report(directory)) is None or report["tokens"] < warm:
        time.sleep(0.1)
    ctl = [sys.executable, "-m", "trainer", "ctl", str(directory), "snapshot"]
    subprocess.run(ctl, check=True, stdout=subprocess.DEVNULL)


def _rate(
    directory: Path, overrides: list[str], seconds: float, share: float | None, used: dict[float, list[float]]
) -> float:
    """Tokens trained per second beside one monitor; the cores it used go to `used`."""
    said = ["monitor.evaluate=false"] if share is None else [f"monitor.evaluation_share={share}"]
    said += ["monitor.port=0", "monitor.service_port=0", "monitor.evaluation_tokens=100_000_000"]
    command = [sys.executable, "-m", "monitor", RUN_FILE, *overrides, *said]
    with _ended(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)) as monitor:
        assert monitor.stderr is not None
        ready = "no evaluation" if share is None else "evaluating with"
        if not any(ready in line for line in monitor.stderr):
            raise RuntimeError("the monitor ended")
        time.sleep(SETTLE_SECONDS)
        busy, first = psutil.Process(monitor.pid), _next_report(directory)
        before = sum(busy.cpu_times()[:2])
        while (last := _next_report(directory))["time"] < first["time"] + seconds:
            pass
        if share is not None:
            used.setdefault(share, []).append((sum(busy.cpu_times()[:2]) - before) / (last["time"] - first["time"]))
    if any(directory.glob("snapshots/*/*/evaluation.json")):
        raise RuntimeError("the evaluation was done before its turn was over: there is too little held-out text")
    return (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])


def _next_report(directory: Path) -> dict[str, Any]:
    """The first report that is not there yet."""
    before = last_report(directory)
    while (report := last_report(directory)) is None or report == before:
        time.sleep(0.02)
    return report


@contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()
