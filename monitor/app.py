"""The monitor as a process: the service in threads, and the evaluation of new snapshots in the main thread.

`monitor.evaluation.follow` imports torch, and is imported when there is something to evaluate.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from monitor.export.errors import ExportError
from monitor.http.access import TokenError, read_token
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.service import make_app, start_service
from monitor.metrics import MonitorMetrics
from monitor.run_directory import is_finished, is_training, why_not_ready
from monitor.settings import MonitorSettings, MonitorTable
from monitor.snapshot_index import index_of
from monitor.summary import complete_summary
from producer.common.metrics import new_registry, start_metrics_server
from producer.common.process import give_way

if TYPE_CHECKING:
    from monitor.evaluation.follow import Evaluator

LAST_LOOK_SECONDS = 2.0
"""Time in which those who watch the run get its results, before the service ends: `top` asks every second."""
HANG_SECONDS = 900.0
"""One forward pass that takes longer than this is taken for a hang."""

log = logging.getLogger("sluice.monitor")


def run(settings: MonitorSettings, until_evaluated: bool, stop: threading.Event) -> int:
    """Serves and evaluates until `stop` is set, or the finished run is evaluated; returns the exit code."""
    try:
        return _run(settings, until_evaluated, stop)
    except (TokenError, ExportError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s", error)
        return 1


def _run(settings: MonitorSettings, until_evaluated: bool, stop: threading.Event) -> int:
    directory, table = settings.run.folder, settings.monitor
    token = None if table.token_file is None else read_token(Path(table.token_file).absolute())
    wandb = _wandb(directory, table)
    registry = new_registry()
    follower = RunFollower(settings, MonitorMetrics(registry), stop)
    metrics_port, close_metrics = start_metrics_server(
        registry, table.host, table.port, alive=follower.alive, ready=follower.ready, allowed_hosts=table.allowed_hosts
    )
    try:
        port, close_service = start_service(
            make_app(directory, registry, follower.unhealthy, token, follower.handle),
            table.host,
            table.service_port,
            partial(is_training, directory),
            table.allowed_hosts if token is None else None,
        )
        log.info(
            "%s at http://%s:%d/, metrics at http://%s:%d/metrics",
            directory,
            table.host,
            port,
            table.host,
            metrics_port,
        )
        try:
            with wandb:
                return follower.follow(until_evaluated)
        finally:
            close_service()
    finally:
        close_metrics()


def _wandb(directory: Path, table: MonitorTable) -> AbstractContextManager[None]:
    """The block in which the run is sent to Weights & Biases, if it is. Raises ExportError where it cannot be."""
    if not table.wandb:
        return nullcontext()
    from monitor.export.wandb_live import live_runs, require_login

    require_login()
    return live_runs(directory, table.poll_seconds)


class RunFollower:
    """The work of the main thread: evaluate each new snapshot of the run, and complete its summary at the end."""

    def __init__(
        self,
        settings: MonitorSettings,
        metrics: MonitorMetrics,
        stop: threading.Event,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self._settings = settings
        self._directory = settings.run.folder
        self._metrics = metrics
        self._stop = stop
        self._hang_seconds = hang_seconds
        self._evaluator: Evaluator | None = None
        self._disabled = settings.why_not_evaluated()
        """Why nothing is evaluated."""
        self.handle = ExplorerHandle()
        if self._disabled or not settings.monitor.latents_tokens:
            self.handle.disable(f"{self._disabled or 'monitor.latents_tokens is 0'}.")

    def follow(self, until_evaluated: bool) -> int:
        """Follows the run until `stop` is set or, if so asked, until it is evaluated; returns the exit code."""
        if self._disabled:
            log.info("no evaluation: %s", self._disabled)
        while not self._stop.is_set():
            # The summary comes after the last snapshot: asked in this order, a finished run has published it.
            finished = is_finished(self._directory)
            self._look(finished)
            if finished and self._is_up_to_date():
                complete_summary(self._directory)
                if until_evaluated:
                    self._stop.wait(LAST_LOOK_SECONDS)
                    return 1 if self._evaluator is not None and self._evaluator.has_failed() else 0
            self._stop.wait(self._settings.monitor.poll_seconds)
        return 0

    def unhealthy(self) -> str | None:
        """The fault of the evaluation; None when there is none."""
        moved_at = self._evaluator.moved_at if self._evaluator else None
        if moved_at is not None and time.monotonic() - moved_at > self._hang_seconds:
            return f"the evaluation has not moved for {time.monotonic() - moved_at:.0f} s"
        return None

    def alive(self) -> tuple[bool, str]:
        return (False, fault) if (fault := self.unhealthy()) else (True, self._disabled or "ok")

    def ready(self) -> tuple[bool, str]:
        return (False, missing) if (missing := why_not_ready(self._directory)) else (True, "ok")

    def _look(self, is_finished: bool) -> None:
        """Evaluates the newest snapshot, if it is new."""
        names = index_of(self._directory).names()
        self._metrics.set_run(len(names), int(names[-1]) if names else None, is_finished)
        if self._disabled or not (names or (self._directory / "metrics.jsonl").is_file()):
            return  # the language model is loaded while the run works towards its first snapshot, not before it begins
        if self._evaluator is None:
            self._evaluator = self._new_evaluator()
        from monitor.evaluation.follow import Stopped

        try:
            self._evaluator.look()
        except Stopped:
            log.info("stopped during an evaluation; the next start continues it")
        self._disabled = self._evaluator.broken

    def _new_evaluator(self) -> Evaluator:
        # This thread and those that torch starts from it; the service's keep their priority.
        give_way()
        from monitor.evaluation.follow import Evaluator

        return Evaluator(self._settings, self._metrics, self._stop, self.handle)

    def _is_up_to_date(self) -> bool:
        return self._disabled is not None or self._evaluator is None or self._evaluator.is_up_to_date()
