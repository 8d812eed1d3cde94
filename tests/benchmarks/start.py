"""How long one waits: for `--help`, and for the demo's first training step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from monitor.run_directory import last_report
from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.together import demo_overrides, start

PROGRAMS = ("producer", "trainer", "monitor")
FIRST_STEP = "first training step of the demo"
PATIENCE_SECONDS = 120


def run(options: Options) -> Iterator[Result]:
    contenders = {f"{program} --help": partial(_help, program) for program in PROGRAMS}
    contenders[FIRST_STEP] = partial(_first_step, options.device)
    result = Result("Start-up", "s").take_turns(options.rounds, contenders)
    result.figures = [
        Figure(name, result.middle(name), 15.0 if name == FIRST_STEP else 1.0, unit="s") for name in result.measured
    ]
    result.notes.append("the first step is seen when the trainer first reports, which may be 2 s later")
    yield result


def _help(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", program, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _first_step(device: str) -> float:
    """Seconds from starting both processes to the trainer's first report that has tokens."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        overrides = demo_overrides(Path(folder), device)
        processes = [start("trainer", overrides), start("producer", overrides)]
        try:
            while (report := last_report(Path(folder) / "run")) is None or not report["tokens"]:
                if time.monotonic() - began > PATIENCE_SECONDS:
                    raise TimeoutError(f"no training step within {PATIENCE_SECONDS} s")
                time.sleep(0.02)
            return time.monotonic() - began
        finally:
            for process in processes:
                process.kill()
                process.wait()
