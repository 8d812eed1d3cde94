"""Publication of a snapshot, and what the terminal is told of it."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from monitor.cli.progress import progress_bar
from monitor.publishing.folder import find_snapshot, write_folder
from monitor.publishing.hub import HubError, upload
from producer.common.formatting import format_bytes
from producer.common.shell import shell_command
from trainer.snapshot import SnapshotError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class PublishJob:
    """The arguments of `python -m monitor publish`."""

    snapshot: Path
    repository: str
    saes: list[str]
    """Empty for all of the snapshot."""
    license_name: str | None
    is_private: bool
    dry_run_folder: Path | None
    """Where the folder is written instead of uploaded."""


def run(job: PublishJob) -> int:
    """Publishes, or writes the folder; returns the exit code."""
    if not REPOSITORY.fullmatch(job.repository):
        return _fail(2, f"REPO {job.repository!r}: expected OWNER/NAME, such as someone/gpt2-saes")
    if job.dry_run_folder is not None and job.dry_run_folder.exists():
        return _fail(2, f"{job.dry_run_folder} exists: choose another --to")
    try:
        snapshot = find_snapshot(job.snapshot)
        if job.dry_run_folder is not None:
            _write(job, snapshot, job.dry_run_folder.absolute())
            print(f"{job.dry_run_folder} is what would be uploaded to {job.repository}:")
            for path in sorted(path for path in job.dry_run_folder.rglob("*") if path.is_file()):
                print(f"  {path.relative_to(job.dry_run_folder)}  {format_bytes(path.stat().st_size)}")
            return 0
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "snapshot"
            _write(job, snapshot, folder)
            print(f"uploading {snapshot} to {job.repository}", file=sys.stderr)
            print(upload(folder, job.repository, job.is_private, f"Snapshot {snapshot.name}"))
    except SnapshotError as error:
        return _fail(2, str(error))
    except (HubError, OSError) as error:
        return _fail(1, str(error))
    return 0


def _write(job: PublishJob, snapshot: Path, target: Path) -> None:
    with progress_bar("writing the folder") as on_progress:
        write_folder(snapshot, target, job.repository, job.saes, job.license_name, on_progress)


def _fail(code: int, message: str) -> int:
    print(f"{shell_command('monitor', 'publish')}: {message}", file=sys.stderr)
    return code
