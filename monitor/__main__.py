"""`python -m monitor RUN.toml`: serves a run's snapshots, evaluates each new one, and shows how it goes.

Settings are read first, so that `--help` and faults answer at once; torch is imported only when there is something to
evaluate with. The evaluation runs in the main thread at low priority, the service in threads of its own. Exit codes:
0 stopped (or, with --until-evaluated, done), 1 failed, 2 bad settings or usage.
"""

from __future__ import annotations

import logging
import sys
import threading
from importlib import import_module

from monitor.settings import MonitorSettings
from producer.common.command_line import parse_command_line
from producer.common.completion import command_arguments
from producer.common.installation import require_own_packages
from producer.common.logs import set_up
from producer.common.process import give_way, run_within_limits, stop_on_signals
from producer.common.shell import shell_command

PURPOSE = f"""Serves a run's snapshots over HTTP, and measures each new one with the language model.

It only reads what the trainer publishes: start it before, with or after the run, and stop it at any time.

Beside it, for a monitor that is running:
  {shell_command("monitor", "pull", "URL")}
      fetch the newest snapshot, or with --follow each new one
  {shell_command("monitor", "top", "URL")}
      the run's live table in this terminal
  {shell_command("monitor", "explain", "URL")}
      what another language model, on a server that you name, says about latents
and for runs and snapshots on disk:
  {shell_command("monitor", "evaluate", "RUN.toml")}
      the numbers of one snapshot on held-out text, within a time that you set
  {shell_command("monitor", "compare", "A", "B")}
      what changed between two of them
  {shell_command("monitor", "serve", "RUN_DIR", "RUN_DIR")}
      a page on which several runs stand beside each other
  {shell_command("monitor", "publish", "SNAPSHOT", "REPO")}
      put one on the Hugging Face hub, with a model card
  {shell_command("monitor", "export", "RUN", "--to", "DIR")}
      the numbers of a run as CSV, Parquet, for TensorBoard or Weights & Biases; its latents
Each has a --help of its own."""

COMMANDS = {
    "pull": "monitor.cli.pull",
    "top": "monitor.cli.top",
    "compare": "monitor.cli.compare",
    "evaluate": "monitor.cli.evaluate",
    "serve": "monitor.cli.serve",
    "explain": "monitor.cli.explain",
    "export": "monitor.cli.export",
    "publish": "monitor.cli.publish",
}
"""Commands, and the modules whose `main` they are."""
LOW_PRIORITY = {"compare", "evaluate", "export"}
"""Those that compute at length, and give way to a trainer on the same machine."""

UNTIL_EVALUATED = "--until-evaluated"
UNTIL_EVALUATED_HELP = "end once the run is finished, its last snapshot is evaluated and summary.json is complete"

log = logging.getLogger("sluice.monitor")


def main(arguments: list[str] | None = None) -> int:
    require_own_packages()
    arguments = command_arguments() if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        if arguments[0] in LOW_PRIORITY:
            give_way()
        return int(import_module(COMMANDS[arguments[0]]).main(arguments[1:]))
    settings = parse_command_line(
        shell_command("monitor"), PURPOSE, MonitorSettings, arguments, COMMANDS, {UNTIL_EVALUATED: UNTIL_EVALUATED_HELP}
    )
    set_up("monitor")
    stop = threading.Event()
    stop_on_signals(stop.set)
    from monitor.app import run  # imports the web server, which `--help` does not wait for

    return run_within_limits(log, lambda: run(settings, UNTIL_EVALUATED in arguments, stop))


if __name__ == "__main__":
    sys.exit(main())
