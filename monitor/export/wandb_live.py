"""A run in Weights & Biases while it trains: `[monitor] wandb = true`.

A thread reads what is appended to metrics.jsonl and evaluations.jsonl, and sends it. How far it has come, and the ids
of its runs, are kept in RUN/wandb/sluice.json, so that a monitor that is started again goes on there. W&B cannot take
back what it has: where a trainer resumes from a checkpoint, the rows that it gave up stay beside the new ones.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monitor.export.errors import ExportError, missing_extra
from monitor.export.records import REPORTS, Record, evaluation_record, report_records
from monitor.export.wandb_runs import WandbRuns
from monitor.files import read_json
from monitor.history import FILE as EVALUATIONS
from monitor.json_lines import JsonLines
from trainer.state.durable import replace_text

STATE = "sluice.json"
DISABLED_MODES = ("offline", "disabled", "dryrun")
"""Values of WANDB_MODE with which nothing is uploaded."""
FINISH_SECONDS = 60.0
"""Time that uploads have when the monitor ends; wandb keeps the rest on disk, for `wandb sync`."""

log = logging.getLogger("sluice.monitor")


def require_login() -> None:
    """Raises ExportError where wandb is not installed, or would ask in the terminal for a key that it needs."""
    try:
        import wandb
    except ImportError:
        raise missing_extra("monitor.wandb = true", "wandb", "wandb") from None
    is_offline = os.environ.get("WANDB_MODE", "online") in DISABLED_MODES
    if not is_offline and not wandb.login(prompt=False, verify=False):
        raise ExportError(
            "monitor.wandb = true needs a key: run `wandb login` or set WANDB_API_KEY. With WANDB_MODE=offline, runs "
            "are written to the run directory, and `wandb sync` uploads them later"
        )


@contextmanager
def live_runs(run_directory: Path, poll_seconds: float) -> Iterator[None]:
    """Sends a run's numbers from a thread of its own, until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run_directory, poll_seconds, stop), name="wandb", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            log.warning("Weights & Biases did not take everything in %.0f s; run `wandb sync`", FINISH_SECONDS)


def _follow(run_directory: Path, poll_seconds: float, stop: threading.Event) -> None:
    while not (run_directory / REPORTS).is_file():
        if stop.wait(poll_seconds):
            return
    try:
        state = _State(run_directory)
        with WandbRuns(run_directory, run_directory, group_id=state.group_id) as runs:
            is_last = False
            while not is_last:
                is_last = stop.wait(poll_seconds)  # what came before the end is sent too
                for record in state.new_records():
                    runs.log(record)
                state.save()
    except Exception as error:
        # A library that talks to another company's service may fail in any way: the monitor has other work.
        log.error("Weights & Biases: %s; nothing more is sent there until the monitor is started again", error)


class _State:
    """What of a run directory was sent."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "wandb" / STATE
        document = read_json(self._path, run_directory) or {}
        if document.get(REPORTS, 0) > (run_directory / REPORTS).stat().st_size:
            document = {}  # of another run, which was in this folder before
        self.group_id: str = document.get("id", secrets.token_hex(6))
        """Beginning of the ids of the runs."""
        self._reports = JsonLines(run_directory / REPORTS, document.get(REPORTS, 0))
        self._evaluations = JsonLines(run_directory / EVALUATIONS, document.get(EVALUATIONS, 0))

    def new_records(self) -> Iterator[Record]:
        """Rows that were not sent yet."""
        for report in self._reports.read_new():
            yield from report_records(report)
        for line in self._evaluations.read_new():
            if (record := evaluation_record(line)) is not None:
                yield record

    def save(self) -> None:
        document = {"id": self.group_id, REPORTS: self._reports.offset, EVALUATIONS: self._evaluations.offset}
        self._path.parent.mkdir(exist_ok=True)
        replace_text(self._path, json.dumps(document) + "\n")
