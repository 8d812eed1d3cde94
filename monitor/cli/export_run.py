"""Export of a run, and what the terminal is told of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from monitor.cli.progress import progress_bar
from monitor.export.errors import ExportError
from monitor.export.event_files import write_tensorboard
from monitor.export.files import write_csv, write_parquet
from monitor.export.records import REPORTS, OnProgress, Records, scan
from monitor.export.wandb_runs import write_wandb
from producer.common.formatting import format_bytes
from producer.common.shell import shell_command

WRITERS: dict[str, Callable[[Records, Path, OnProgress], list[Path]]] = {
    "csv": write_csv,
    "parquet": write_parquet,
    "tensorboard": write_tensorboard,
    "wandb": write_wandb,
}
NEXT_STEPS = {"tensorboard": "tensorboard --logdir {}", "wandb": "wandb sync {}"}
"""The command that shows what was written."""


def run_numbers(directory: Path, to: Path, format_name: str) -> int:
    """Exports the numbers of a run; returns the exit code."""
    try:
        require_new(to)
        records = _scan(directory)
    except ExportError as error:
        return fail(2, str(error))
    try:
        to.mkdir(parents=True, exist_ok=True)
        with progress_bar(f"writing {format_name}") as on_progress:
            paths = WRITERS[format_name](records, to, on_progress)
    except (ExportError, OSError) as error:
        return fail(1, str(error))
    print(f"{records.reports:,} reports and {records.evaluations:,} evaluations of {len(records.saes)} SAEs:")
    for path in paths:
        print(f"  {path}")
    if format_name in NEXT_STEPS:
        print(f"next: {NEXT_STEPS[format_name].format(' '.join(map(str, paths)))}")
    return 0


def run_latents(
    directory: Path, to: Path, format_name: str, saes: list[str], model_id: str | None, set_name: str | None
) -> int:
    """Exports latents; returns the exit code."""
    from monitor.export.latents.bulk import Naming, write_latents  # imports torch

    try:
        require_new(to)
        with progress_bar(f"writing {format_name}") as on_progress:
            folders = write_latents(directory, to, format_name, saes, Naming(model_id, set_name), on_progress)
    except ExportError as error:
        return fail(2, str(error))
    except OSError as error:
        return fail(1, str(error))
    for folder in folders:
        files = list(folder.iterdir())
        size = format_bytes(sum(path.stat().st_size for path in files))
        print(f"{folder}: {len(files)} files, {size}")
    return 0


def require_new(to: Path) -> None:
    """Raises ExportError for a folder that holds something, or is none."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ExportError(f"{to} exists and is not an empty folder: choose another --to")


def fail(code: int, message: str) -> int:
    print(f"{shell_command('monitor', 'export')}: {message}", file=sys.stderr)
    return code


def _scan(directory: Path) -> Records:
    """The rows of a run directory. Raises ExportError where there are none."""
    if not (directory / REPORTS).is_file():
        raise ExportError(
            f"{directory} holds no {REPORTS}: name a run directory, such as runs/gpt2, in which a trainer has reported"
        )
    with progress_bar(f"reading {REPORTS}") as on_progress:
        records = scan(directory, on_progress)
    if not records.reports:
        raise ExportError(f"{directory / REPORTS} holds no report yet; the trainer writes one about every two seconds")
    return records
