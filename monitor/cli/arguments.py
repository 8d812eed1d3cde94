"""Arguments that `pull` and `top` have in common."""

from __future__ import annotations

import argparse
import os


def add_monitor_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `url`, and `token`, which SLUICE_TOKEN sets too."""
    parser.add_argument("url", metavar="URL", help="where the monitor serves, such as http://127.0.0.1:8710")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        default=os.environ.get("SLUICE_TOKEN"),
        help="of a monitor that asks for one; better set as SLUICE_TOKEN, which `ps` hides",
    )
