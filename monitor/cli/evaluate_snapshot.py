"""Evaluation of one snapshot, and what the terminal is told of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from monitor.cli.errors import UsageError
from monitor.cli.progress import progress_bar
from monitor.evaluation.compatibility import why_incompatible
from monitor.evaluation.errors import EvaluationError
from monitor.evaluation.evaluator import Progress, evaluate
from monitor.evaluation.inputs import EvaluationInputs, PublishedSnapshot, load_inputs
from monitor.evaluation.measures import Measure, Stage, measures
from monitor.evaluation.results import Evaluation, write_evaluation
from monitor.publishing.folder import find_snapshot
from monitor.settings import MonitorSettings
from producer.common.run_file import read_run_file
from producer.common.shell import shell_command
from producer.common.toml import SettingsError
from producer.corpus import CorpusError
from producer.lm.errors import ModelError
from producer.lm.passes import TimeLimit
from trainer.saes.inference import InferenceSae, load_sae
from trainer.snapshot import SnapshotError


@dataclass(frozen=True)
class EvaluateJob:
    """The arguments of `python -m monitor evaluate`."""

    run_file: Path
    overrides: list[str]
    snapshot: Path | None
    saes: list[str]
    """Empty for all of the snapshot."""
    seconds: float | None
    is_saved: bool
    is_json: bool


def run(job: EvaluateJob) -> int:
    """Measures, and prints the numbers; returns the exit code."""
    try:
        settings = read_run_file(MonitorSettings, job.run_file, [*job.overrides, "monitor.evaluate=true"])
        if reason := settings.why_not_evaluated():
            raise UsageError(reason)
        snapshot = PublishedSnapshot.read(find_snapshot(job.snapshot or settings.run.folder))
        names = job.saes or snapshot.saes
        if unknown := [name for name in names if name not in snapshot.saes]:
            raise UsageError(f"--sae {unknown[0]}: {snapshot.folder} has {', '.join(snapshot.saes)}")
    except (SettingsError, SnapshotError, UsageError) as error:
        return _fail(2, str(error))
    try:
        print(f"loading {settings.model.name if settings.model else ''} and held-out text", file=sys.stderr)
        inputs = load_inputs(settings)
        if snapshot.revision != inputs.revision and settings.model is not None:
            inputs = inputs.at_revision(settings.model, snapshot.revision)
        inputs.check_stream(snapshot)
        saes = [load_sae(snapshot.folder / name, inputs.model.device) for name in names]
        reasons = {sae.name: why_incompatible(inputs.model, sae) for sae in saes}
        for reason in filter(None, reasons.values()):
            print(f"not measured: {reason}", file=sys.stderr)
        compatible = [sae for sae in saes if reasons[sae.name] is None]
        if not compatible:
            return _fail(1, f"no SAE of {snapshot.folder} fits the language model")
        results = _measure(inputs, snapshot, compatible, job.seconds or settings.monitor.evaluation_seconds)
    except (SnapshotError, CorpusError, EvaluationError, ModelError) as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(1, "stopped before anything was measured")
    if job.is_json:
        print(json.dumps({name: result.as_json() for name, result in results.items()}, indent=1))
    else:
        show(snapshot, results, job.run_file)
    if job.is_saved:
        for name, result in results.items():
            write_evaluation(snapshot.folder, name, result)
    return 0


def _measure(
    inputs: EvaluationInputs, snapshot: PublishedSnapshot, saes: list[InferenceSae], seconds: float
) -> dict[str, Evaluation]:
    """The numbers of each SAE. Raises EvaluationError, and KeyboardInterrupt before there are any."""
    began = time.monotonic()
    results: dict[str, Evaluation] = {}

    def remember(progress: Progress) -> None:
        with suppress(EvaluationError):  # nothing of the stream was read yet
            results.update(progress.results())
        on_share(max(progress.share, (time.monotonic() - began) / seconds))

    with progress_bar("reading held-out text") as on_share:
        try:
            results |= evaluate(
                inputs.model, inputs.text.windows, saes, inputs.baseline, snapshot.norm_bounds,
                corpora=inputs.text.corpora, limit=TimeLimit(seconds), on_progress=remember,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not results:
                raise
    took = round(time.monotonic() - began, 3)
    return {
        name: replace(result, snapshot=snapshot.name, snapshot_tokens=snapshot.tokens, seconds=took)
        for name, result in results.items()
    }


def show(snapshot: PublishedSnapshot, results: Mapping[str, Evaluation], run_file: Path) -> None:
    """Prints a table for people, and what was not measured."""
    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(f"snapshot {snapshot.name}")
    for name in results:
        table.add_column(name, justify="right")
    absent: list[str] = []
    for measure in measures(Stage.HELD_OUT):
        rows = _rows(measure, results)
        absent += [] if rows else [measure.title]
        for title, values in rows.items():
            table.add_row(title, *values)
    console.print(table)
    any_result = next(iter(results.values()))
    share = "all of the held-out text"
    if any_result.text_share is not None:
        share = f"{any_result.text_share:.0%} of the held-out text, spread over it; --seconds gives it more time"
    console.print(
        f"Measured on {any_result.rows or 0:,} activations and {any_result.predictions or 0:,} predicted tokens in "
        f"{any_result.seconds or 0:.0f} s: {share}.",
        soft_wrap=True,
    )
    if absent:
        console.print(f"Not measured: {', '.join(absent)}.", soft_wrap=True)
    command = shell_command("monitor", str(run_file), "--until-evaluated")
    console.print(f"Pages of latents, and what they are worth, come from the monitor: {command}", soft_wrap=True)


def _rows(measure: Measure, results: Mapping[str, Evaluation]) -> dict[str, list[str]]:
    """The lines of a measure, by title: one for each of its labels; none where no SAE has a value."""
    values = {name: result.value(measure) for name, result in results.items()}
    if not measure.label:
        if all(value is None for value in values.values()):
            return {}
        return {measure.title: [_text(value, measure.format) for value in values.values()]}
    labels = list(dict.fromkeys(label for value in values.values() if isinstance(value, Mapping) for label in value))
    return {
        f"{measure.title}: {label}": [
            _text(value.get(label) if isinstance(value, Mapping) else None, measure.format) for value in values.values()
        ]
        for label in labels
    }


def _text(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _fail(code: int, message: str) -> int:
    print(f"{shell_command('monitor', 'evaluate')}: {message}", file=sys.stderr)
    return code
