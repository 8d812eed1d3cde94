"""`python -m monitor top`: the live table of a run in the terminal."""

from __future__ import annotations

from monitor.cli.arguments import add_monitor_arguments
from producer.common.command_parser import command_parser
from producer.common.completion import complete


def main(arguments: list[str]) -> int:
    """Returns 0 when the reader has left, 1 when the monitor did not answer or refused, 2 for wrong usage."""
    parser = command_parser(
        "monitor", "top", "Watch a run in the terminal; q or Ctrl-C leaves.", ("http://127.0.0.1:8710",)
    )
    add_monitor_arguments(parser)
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    from monitor.cli.run_view import run  # imports the HTTP client and rich, which `--help` does not wait for

    return run(options.url, options.token)
