"""`python -m trainer tune RUN_DIR --sae NAME --tokens N`: an SAE tuned for what the language model does with it.

Exit codes: 0 tuned, or stopped on request; 1 it failed; 2 the arguments are not right, or the SAE cannot be tuned.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser, positive_count, positive_number
from producer.common.completion import complete, complete_settings
from producer.common.logs import set_up
from producer.common.process import run_within_limits, stop_on_signals
from producer.common.toml import SettingsError
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError
from trainer.state.run_directory import RunDirectory, RunDirectoryError
from trainer.tuning.options import LOSSES, TuningError, TuningOptions

if TYPE_CHECKING:
    from trainer.tuning.session import TuningResult
    from trainer.tuning.source import TuningSource

PURPOSE = """Tunes a published SAE for what the language model does with its reconstruction: the divergence of the
model's predictions with the SAE at its hook from those without it, alone (kl) or beside the squared error (kl+mse).
The model stays as it is. Measures on held-out text before and after; trains on the text that the run trained on.

Writes a run directory of its own, RUN_DIR/tuned/NAME-LOSS unless --to names another, which the monitor serves and
`pull` and `export` read. Stop it with Ctrl-C; the same command goes on."""

RATE_SHARE = 0.1
"""Peak of the learning rate, as a share of the peak in training."""

log = logging.getLogger("sluice.trainer")


def main(arguments: list[str]) -> int:
    parser = _parser()
    complete(parser, arguments)
    options = parser.parse_intermixed_args(arguments)
    set_up("tune")
    return run_within_limits(log, lambda: _tune(options))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "trainer",
        "tune",
        PURPOSE,
        (
            "runs/demo --sae topk --tokens 200000",
            "runs/demo --sae jumprelu --tokens 1_000_000 --loss kl --to runs/demo-kl",
            "runs/gpt2 --sae topk --tokens 25_000_000 model.device=cuda",
        ),
    )
    parser.add_argument("directory", type=path_argument, metavar="RUN_DIR", help="run.directory of the run file")
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces one setting of the run, such as model.name"
    )
    parser.add_argument("--sae", required=True, metavar="NAME", help="the SAE to tune")
    parser.add_argument("--tokens", required=True, type=_count, metavar="N", help="activations to train on")
    parser.add_argument("--loss", choices=LOSSES, default="kl+mse", help="kl+mse without it")
    parser.add_argument("--snapshot", metavar="NAME", help="without it, the newest that has the SAE")
    parser.add_argument(
        "--learning-rate",
        type=positive_number,
        metavar="X",
        help=f"at the peak; {RATE_SHARE:g} of the training's without it",
    )
    parser.add_argument("--batch", type=_count, metavar="N", help="positions of one step; optimizer.batch without it")
    parser.add_argument(
        "--evaluation-tokens", type=_count, default=16_384, metavar="N", help="held-out activations; 16384 without it"
    )
    parser.add_argument("--to", type=path_argument, metavar="DIR", help="the run directory that it writes")
    complete_settings(overrides, TrainerSettings)
    return parser


def _tune(options: argparse.Namespace) -> int:
    from producer.corpus import CorpusError
    from producer.lm.errors import ModelError
    from trainer.tuning.session import TuningSession  # imports torch, which `--help` does not wait for
    from trainer.tuning.source import read_run, read_source

    stop = threading.Event()
    stop_on_signals(stop.set)
    directory = options.directory.absolute()
    try:
        source = read_source(directory, read_run(directory, options.overrides), options.sae, options.snapshot)
        target = (options.to or directory / "tuned" / f"{options.sae}-{options.loss}").absolute()
        with RunDirectory(target):
            result = TuningSession(source, _options(options, source), target, stop).run()
    except (TuningError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 2
    except (ModelError, CorpusError, SnapshotError, RunDirectoryError, OSError) as error:
        log.error("%s", error)
        return 1
    if result is None:
        log.info("stopped; the same command goes on")
    else:
        _show(result)
    return 0


def _options(options: argparse.Namespace, source: TuningSource) -> TuningOptions:
    return TuningOptions(
        sae=source.name,
        snapshot=source.manifest.name,
        tokens=options.tokens,
        loss=options.loss,
        learning_rate=options.learning_rate or RATE_SHARE * source.training_rate,
        batch=options.batch or source.run.optimizer.batch,
        evaluation_tokens=options.evaluation_tokens,
    )


def _show(result: TuningResult) -> None:
    """Prints the quality before and after."""
    from rich.console import Console
    from rich.table import Table

    before, after = result.before, result.after
    table = Table("", "before", "after", "change", title=f"{before.activations:,} held-out activations")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, old, new in (
        ("ΔCE, nats per token", before.ce_delta, after.ce_delta),
        ("KL, nats per token", before.kl, after.kl),
        ("FVU", before.fvu, after.fvu),
        ("L0", before.l0, after.l0),
    ):
        table.add_row(name, f"{old:.4g}", f"{new:.4g}", f"{100 * (new / old - 1):+.1f} %" if old else "")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"cross-entropy of the model alone: {before.ce_clean:.4f}", highlight=False)
    console.print(f"published: {_shortest(result.folder)}", highlight=False, markup=False)


def _shortest(path: Path) -> Path:
    """The path from the working directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _count(text: str) -> int:
    """A whole number, with underscores between its digits or without, as in a run file."""
    return positive_count(text.replace("_", ""))
