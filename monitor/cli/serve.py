"""`python -m monitor serve`: a page on which several runs stand beside each other."""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from pathlib import Path

from producer.common.addresses import check_host, is_loopback, path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete
from producer.common.logs import set_up
from producer.common.process import run_within_limits, stop_on_signals

PORT = 8711

log = logging.getLogger("sluice.monitor")


def main(arguments: list[str]) -> int:
    """Returns 0 when stopped, 1 when the port is taken, 2 for wrong usage."""
    parser = command_parser(
        "monitor",
        "serve",
        "Show several runs beside each other: numbers, curves, frontiers of L0 and FVU or ΔCE, settings. "
        "It reads their directories, finished or not, and evaluates nothing: that is the work of each run's own "
        "monitor.",
        ("runs", "runs/a runs/b --port 8720"),
    )
    parser.add_argument(
        "paths", nargs="+", type=path_argument, metavar="RUN_DIR", help="a run directory, or a folder that holds some"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port; 0 takes any free one (default: {PORT})")
    parser.add_argument("--token-file", type=path_argument, metavar="FILE", help="a token to ask for")
    parser.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="another name of the host")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: expected 0 to 65535")
    try:
        check_host(options.host)
    except ValueError as error:
        parser.error(f"--host: {error}")
    if options.token_file is None and not is_loopback(f"tcp://{options.host}:{options.port}"):
        parser.error(f"--host {options.host} is reachable from other machines; name a token's file as --token-file")
    return _serve(options.paths, options)


def _serve(paths: list[Path], options: argparse.Namespace) -> int:
    from monitor.http.access import TokenError, read_token  # the web server, which `--help` does not wait for
    from monitor.runs.directories import NoRunsError, check_paths
    from monitor.runs.service import serve_runs

    try:
        check_paths(paths)
        token = None if options.token_file is None else read_token(options.token_file.absolute())
    except (NoRunsError, TokenError) as error:
        print(str(error).replace("monitor.token_file =", "--token-file"), file=sys.stderr)
        return 2
    set_up("monitor")
    stop = threading.Event()
    stop_on_signals(stop.set)
    return run_within_limits(
        log, lambda: serve_runs(paths, options.host, options.port, token, options.allowed_host, stop)
    )
