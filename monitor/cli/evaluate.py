"""`python -m monitor evaluate`: the numbers of one snapshot on held-out text, without a running monitor."""

from __future__ import annotations

import argparse

from monitor.settings import MonitorSettings
from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete, complete_run_file, complete_settings


def main(arguments: list[str]) -> int:
    """Returns 0 when something was measured, 1 when nothing could be, 2 for wrong usage."""
    parser = command_parser(
        "monitor",
        "evaluate",
        "Measure the SAEs of one snapshot with the language model, on text that the run never trained on.",
        (
            "deploy/gpt2.toml                                         # the newest snapshot of its run",
            "deploy/gpt2.toml --snapshot pulled/000040000512 --seconds 60",
        ),
        epilog="Where the time ends before the text, and after Ctrl-C, the numbers are of what was read until then.",
    )
    run_file = parser.add_argument(
        "run_file", type=path_argument, metavar="RUN.toml", help="the run's settings: language model, text, hooks"
    )
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces one setting of the file"
    )
    parser.add_argument(
        "--snapshot", metavar="DIR", type=path_argument,
        help="folder of a snapshot, or a run directory (default: run.directory); the newest of a run",
    )  # fmt: skip
    parser.add_argument("--sae", metavar="NAME", action="append", default=[], help="this SAE only; may be repeated")
    parser.add_argument("--seconds", metavar="S", type=_positive, help="time (default: monitor.evaluation_seconds)")
    parser.add_argument("--save", action="store_true", help="write evaluation.json beside each SAE")
    parser.add_argument(
        "--json", action="store_true", help="print the contents of evaluation.json, by SAE, for scripts"
    )
    complete_run_file(run_file, ())
    complete_settings(overrides, MonitorSettings)
    complete(parser, arguments)
    options = parser.parse_intermixed_args(arguments)
    from monitor.cli.evaluate_snapshot import EvaluateJob, run  # imports torch, which `--help` does not wait for

    return run(
        EvaluateJob(
            run_file=options.run_file,
            overrides=options.overrides,
            snapshot=options.snapshot,
            saes=options.sae,
            seconds=options.seconds,
            is_saved=options.save,
            is_json=options.json,
        )
    )


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return seconds
