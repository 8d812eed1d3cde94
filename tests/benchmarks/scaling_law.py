"""`make scaling-law`: trains the grid of deploy/scaling.toml, evaluates it, and predicts the SAEs that are held out.

    python -m tests.benchmarks.scaling_law [section.key=value …]

A run directory that is there already is continued, and fitted again where its run is finished.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from producer.common.run_file import read_run_file
from trainer.scaling import fit
from trainer.settings import TrainerSettings

RUN_FILE = Path(__file__).parents[2] / "deploy" / "scaling.toml"
HELD_OUT = "4096"
PROCESSES = {"trainer": (), "producer": (), "monitor": ("--until-evaluated",)}


def needed(processes: dict[str, subprocess.Popen[bytes]]) -> list[str]:
    """The processes that must end well: without a producer, which finds no trainer where the run is finished."""
    return [name for name in processes if name != "producer" or processes["trainer"].poll() != 0]


def main(overrides: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it ends its processes too
    settings = read_run_file(TrainerSettings, RUN_FILE, overrides)
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.run.threads or 1)}
    processes = {
        name: subprocess.Popen([sys.executable, "-m", name, *options, str(RUN_FILE), *overrides], env=environment)
        for name, options in PROCESSES.items()
    }
    try:
        while not (failed := [name for name in needed(processes) if processes[name].poll()]):
            if all(processes[name].poll() == 0 for name in needed(processes)):
                break
            time.sleep(1)
    finally:
        for process in processes.values():
            process.terminate()
    if failed:
        print(f"the {failed[0]} failed; its log above says why", file=sys.stderr)
        return 1
    return fit.main([str(settings.run.folder), "--hold-out", HELD_OUT])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
