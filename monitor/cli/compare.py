"""`python -m monitor compare`: what changed between two snapshots, or between two SAEs on the same activations."""

from __future__ import annotations

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete


def main(arguments: list[str]) -> int:
    """Returns 0 when compared, 2 for wrong usage, such as a folder that holds no SAE."""
    parser = command_parser(
        "monitor",
        "compare",
        "Show what changed between two snapshots: numbers, and latents that were born, died or turned.",
        (
            "runs/gpt2/snapshots/000020000256 runs/gpt2/snapshots/000040000512",
            "runs/a/snapshots/000040000512/topk runs/b/snapshots/000040000512/topk --json",
        ),
    )
    for name, position in (("A", "before"), ("B", "after")):
        parser.add_argument(name, type=path_argument, help=f"folder of a snapshot, or of an SAE in one: {position}")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for scripts")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    from monitor.cli.comparison_tables import run  # imports numpy and rich, which `--help` does not wait for

    return run(options.A, options.B, options.json)
