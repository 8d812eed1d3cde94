"""`python -m monitor export`: the numbers of a run for other programs.

python -m monitor export runs/gpt2 --to out                        # run.csv, training.csv, evaluation.csv
python -m monitor export runs/gpt2 --to out --format tensorboard
"""

from __future__ import annotations

import argparse

from producer.common.addresses import path_argument
from producer.common.completion import complete
from producer.common.shell import shell_command

FORMATS = {
    "csv": "run.csv, training.csv, evaluation.csv",
    "parquet": "the same tables; needs the extra `parquet`",
    "tensorboard": "event files; needs the extra `tensorboard`",
    "wandb": "offline runs of Weights & Biases, for `wandb sync`; needs the extra `wandb`",
}
"""What each format gives."""


def main(arguments: list[str]) -> int:
    """Returns 0 when everything is written, 1 when it could not be, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog=shell_command("monitor", "export"),
        description="Write the numbers of a run for other programs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:<12} {gives}" for name, gives in FORMATS.items()),
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_argument, help="run directory; the trainer may be at work in it"
    )
    parser.add_argument("--to", metavar="DIR", type=path_argument, required=True, help="a new folder, or an empty one")
    parser.add_argument("--format", choices=FORMATS, default="csv", help="see below (default: %(default)s)")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    from monitor.cli.export_run import run  # imports rich, which `--help` does not wait for

    return run(options.run, options.to, options.format)
