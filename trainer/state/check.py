"""`python -m trainer check RUN_DIR`: whether a run directory is whole, and what starting its trainer again would do.

Exit codes: 0 whole, 1 something is wrong, and each fault is a line that says what to do.
"""

from __future__ import annotations

import sys

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete

PURPOSE = """Tells whether a run directory is whole, and what starting its trainer again would do.

Compares checkpoints and snapshots with their hashes, runs each snapshot's self-test, and balances the ledger's books.
Changes nothing, and may be run while the trainer is at work."""


def main(arguments: list[str]) -> int:
    parser = command_parser("trainer", "check", PURPOSE, ("runs/gpt2",))
    parser.add_argument("directory", type=path_argument, metavar="RUN_DIR", help="run.directory of the run file")
    complete(parser, arguments)
    directory = parser.parse_args(arguments).directory.absolute()
    from trainer.state.inspection import Inspection  # imports torch, which `--help` does not wait for

    inspection = Inspection(directory)
    inspection.run()
    print("\n".join(inspection.findings))
    for fault in inspection.faults:
        print(f"fault: {fault}", file=sys.stderr)
    return int(bool(inspection.faults))
