"""`python -m monitor pull`: fetches snapshots from a running monitor."""

from __future__ import annotations

from pathlib import Path

from monitor.cli.arguments import add_monitor_arguments
from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete


def main(arguments: list[str]) -> int:
    """Returns 0 when the snapshot is there, 1 when it could not be fetched, 2 for wrong usage."""
    parser = command_parser(
        "monitor",
        "pull",
        "Fetch a snapshot from a monitor, every byte checked. Interrupted, the next call goes on there.",
        ("http://127.0.0.1:8710", "http://127.0.0.1:8710 --follow --to snapshots"),
    )
    add_monitor_arguments(parser)
    parser.add_argument(
        "--to", metavar="DIR", type=path_argument, default=Path("."), help="folder to put it in (default: here)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", metavar="NAME", help="a snapshot by name, such as 000001234567 (default: the newest)")
    which.add_argument("--follow", action="store_true", help="and each new one, until the run is finished or Ctrl-C")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    from monitor.cli.download import run  # imports the HTTP client, which `--help` does not wait for

    return run(options.url, options.token, options.to, options.name, options.follow)
