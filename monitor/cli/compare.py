"""`python -m monitor compare`: what changed between two snapshots, or between two SAEs on the same activations.

python -m monitor compare runs/gpt2/snapshots/000020000256 runs/gpt2/snapshots/000040000512
python -m monitor compare A/topk B/topk --json
"""

from __future__ import annotations

import argparse

from producer.common.addresses import path_argument
from producer.common.completion import complete
from producer.common.shell import shell_command


def main(arguments: list[str]) -> int:
    """Returns 0 when compared, 2 for wrong usage, such as a folder that holds no SAE."""
    parser = argparse.ArgumentParser(
        prog=shell_command("monitor", "compare"),
        description="Show what changed between two snapshots: numbers, and latents that were born, died or turned.",
    )
    for name, position in (("A", "before"), ("B", "after")):
        parser.add_argument(name, type=path_argument, help=f"folder of a snapshot, or of an SAE in one: {position}")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for scripts")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    from monitor.cli.comparison_tables import run  # imports numpy and rich, which `--help` does not wait for

    return run(options.A, options.B, options.json)
