"""`python -m trainer RUN.toml`: trains the run's SAEs from the stream until the tokens or the data are used up.

`python -m trainer ctl …` sends a command to a running trainer, `python -m trainer check …` verifies a run directory,
`python -m trainer export …` converts a snapshot, `python -m trainer estimate …` predicts the cost of a run,
`python -m trainer fit …` fits a scaling law, `python -m trainer tune …` tunes a published SAE end to end. `--help`
answers at once; torch is imported by the settings of the first SAE. On SIGTERM, Ctrl-C, a closed terminal and the
signals of batch systems (SIGUSR1, SIGUSR2) the trainer writes a checkpoint and leaves; the same command resumes from
it. `torchrun … -m trainer RUN.toml` trains on many ranks: this module is each of them, and rank 0 does all of the
above, while the others follow it. Exit codes: 0 finished or stopped, 1 failed, 2 bad settings.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from importlib import import_module

from producer.common.command_line import parse_command_line
from producer.common.completion import command_arguments
from producer.common.installation import require_own_packages
from producer.common.logs import set_up
from producer.common.process import run_within_limits, stop_on_signals
from producer.common.shell import shell_command
from trainer.control.requests import Inbox, serve_requests
from trainer.parallel.environment import read_launch, watch_agent
from trainer.parallel.placement import world_fault
from trainer.settings import TrainerSettings
from trainer.state.run_directory import RunDirectory, RunDirectoryError

PURPOSE = f"""Trains sparse autoencoders from the activations that producers stream to it.

Owns the run directory: checkpoint, snapshots, metrics.jsonl, summary.json. Start it again with the same file and it
resumes where it was; every token of the corpus is trained on once per epoch, whatever was killed.

Beside it:
  {shell_command("trainer", "ctl", "RUN_DIR", "COMMAND")}
      command a running trainer: status, snapshot, attach, detach, cooldown, …
  {shell_command("trainer", "check", "RUN_DIR")}
      is the run directory whole, and what would a new start do
  {shell_command("trainer", "export", "SNAPSHOT")} …
      write a snapshot in another library's format
  {shell_command("trainer", "estimate", "RUN.toml")}
      how fast a run would be, and what it would hold, before it starts
  {shell_command("trainer", "fit", "RUN_DIR")}
      the scaling law of a grid of SAEs, and the loss of the next size
  {shell_command("trainer", "tune", "RUN_DIR")} …
      tune a published SAE for what the language model does with its reconstruction
Each has a --help of its own."""

COMMANDS = {
    "ctl": "trainer.control.ctl",
    "check": "trainer.state.check",
    "export": "trainer.saes.export",
    "estimate": "trainer.planning.estimate",
    "fit": "trainer.scaling.fit",
    "tune": "trainer.tuning.command",
}
"""Commands, and the modules whose `main` carries them out."""

log = logging.getLogger("sluice.trainer")


def main(arguments: list[str] | None = None) -> int:
    require_own_packages()
    arguments = command_arguments() if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return int(import_module(COMMANDS[arguments[0]]).main(arguments[1:]))
    # Read when torch is loaded, by the settings of the first SAE: its threads, waiting for the next product, would
    # otherwise spin on the cores of the kernels' threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launch = read_launch(os.environ)
    if launch.rank:  # has no run file: rank 0 sends it the settings
        set_up(f"trainer [rank {launch.rank}]", logging.WARNING)
        from trainer.training.follower import follow

        return run_within_limits(log, lambda: follow(launch))
    settings = parse_command_line(shell_command("trainer"), PURPOSE, TrainerSettings, arguments, COMMANDS)
    set_up("trainer")
    if fault := world_fault(settings, launch.world_size):
        log.error("%s", fault)
        return 2
    stop = threading.Event()
    stop_on_signals(stop.set)
    if settings.stream.keys is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # means that keys have changed, and there is no stream yet
    for warning in settings.warnings():
        log.warning("%s", warning)
    log.info("run directory %s", settings.run.folder)
    try:
        with RunDirectory(settings.run.folder) as directory:
            # Open from the first moment, so that clients wait for their answer and are not told that no trainer runs.
            inbox = Inbox(stop)
            directory.watch(stop.set)
            if launch.world_size > 1:
                watch_agent(stop.set)
            with serve_requests(directory.path, inbox):
                from trainer.app import run  # imports torch, which `--help` and the commands do not wait for

                return run_within_limits(log, lambda: run(settings, directory, inbox, launch))
    except RunDirectoryError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
