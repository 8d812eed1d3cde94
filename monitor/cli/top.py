"""`python -m monitor top`: the live table of a run in the terminal."""

from __future__ import annotations

import argparse

from monitor.cli.arguments import add_monitor_arguments
from producer.common.completion import complete
from producer.common.shell import shell_command


def main(arguments: list[str]) -> int:
    """Returns 0 when the reader has left, 1 when the monitor did not answer or refused, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog=shell_command("monitor", "top"), description="Watch a run in the terminal; q or Ctrl-C leaves."
    )
    add_monitor_arguments(parser)
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    from monitor.cli.run_view import run  # imports the HTTP client and rich, which `--help` does not wait for

    return run(options.url, options.token)
