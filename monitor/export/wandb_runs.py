"""The numbers of a run as runs of Weights & Biases: one for the stream, and one for each SAE, in a group.

Runs, and not keys of one run, are what W&B draws over each other and compares in its table: so each SAE has its own,
with its settings as configuration. The axis is tokens trained. The environment says where they go, as in any program:
WANDB_PROJECT (`sluice` without it), WANDB_ENTITY, WANDB_MODE.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from monitor.export.errors import missing_extra
from monitor.export.records import OnProgress, Record, Records
from monitor.files import read_toml

PROJECT = "sluice"
STREAM = "stream"
"""Name of the run that has no SAE."""

Mode = Literal["online", "offline"]


class WandbRuns:
    """The runs of one run directory. A context manager, which finishes them; to be used from one thread."""

    def __init__(
        self, run_directory: Path, folder: Path, mode: Mode | None = None, group_id: str | None = None
    ) -> None:
        """Files are written to `folder`/wandb. `mode` None leaves it to WANDB_MODE.

        With `group_id`, runs have fixed ids, and are continued where W&B has them already. Raises ExportError where
        wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise missing_extra("Weights & Biases", "wandb", "wandb") from None
        self._wandb = wandb
        self._settings = read_toml(run_directory / "settings.toml", run_directory) or {}
        self._group = run_directory.resolve().name
        self._folder = folder
        self._mode = mode
        self._group_id = group_id
        self._runs: dict[str, Any] = {}

    def log(self, record: Record) -> None:
        """Adds one row, to the run of its SAE."""
        values = {f"{record.table}/{name}": value for name, value in record.values.items()}
        self._run(record.sae or STREAM).log({"tokens": record.tokens, "_timestamp": record.time, **values})

    def __enter__(self) -> WandbRuns:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for run in self._runs.values():
            run.finish(exit_code=0 if kind is None else 1)
        self._wandb.teardown()  # waits for the process that writes the files, which `finish` does not

    def _run(self, name: str) -> Any:
        if name not in self._runs:
            run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=self._group,
                name=f"{self._group}/{name}",
                id=None if self._group_id is None else f"{self._group_id}-{name}",
                resume=None if self._group_id is None else "allow",
                dir=str(self._folder),
                mode=self._mode,
                config=_configuration(self._settings, name),
                reinit="create_new",
                settings=self._wandb.Settings(
                    silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
                ),
            )
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            self._runs[name] = run
        return self._runs[name]


def write_wandb(records: Records, folder: Path, on_progress: OnProgress) -> list[Path]:
    """Writes offline runs, which `wandb sync` uploads. Returns their folders. Raises ExportError without wandb."""
    with WandbRuns(records.directory, folder, mode="offline") as runs:
        for record in records.rows(on_progress):
            runs.log(record)
    return sorted((folder / "wandb").glob("offline-run-*"))


def _configuration(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of the run, with those of one SAE in place of those of all."""
    saes = settings.get("sae")
    own = [sae for sae in saes if isinstance(sae, dict) and sae.get("name") == name] if isinstance(saes, list) else []
    shared = {table: value for table, value in settings.items() if table != "sae"}
    return shared | ({"sae": own[0]} if own else {})
