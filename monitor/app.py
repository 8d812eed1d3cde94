"""The monitor as a process: the service in threads, and the evaluation of new snapshots in the main thread.

`monitor.evaluation.follow` imports torch, and is imported when there is something to evaluate.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from monitor.http.access import TokenError, read_token
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.service import make_app, start_service
from monitor.metrics import MonitorMetrics
from monitor.run_directory import is_finished, is_training, why_not_ready
from monitor.settings import MonitorSettings
from monitor.snapshot_index import index_of
from monitor.summary import complete_summary
from producer.common.metrics import new_registry, start_metrics_server

if TYPE_CHECKING:
    from monitor.evaluation.follow import Evaluator

NICE = 10
LAST_LOOK_SECONDS = 2.0
"""Those who watch the run see its results before the service goes: `top` asks every second."""
HANG_SECONDS = 900.0
"""One forward pass that takes longer than this is taken for a hang."""

log = logging.getLogger("sluice.monitor")


def run(settings: MonitorSettings, until_evaluated: bool, stop: threading.Event) -> int:
    """Serves and evaluates until `stop` is set, or the finished run is evaluated; returns the exit code."""
    try:
        return _run(settings, until_evaluated, stop)
    except TokenError as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s", error)
        return 1


def _run(settings: MonitorSettings, until_evaluated: bool, stop: threading.Event) -> int:

    directory, table = settings.run.folder, settings.monitor
    token = None if table.token_file is None else read_token(Path(table.token_file).absolute())
    registry = new_registry()
    metrics = MonitorMetrics(registry)
    watch = Watch(settings, metrics, stop)
    metrics_port, close_metrics = start_metrics_server(
        registry, table.host, table.port, alive=watch.alive, ready=watch.ready, allowed_hosts=table.allowed_hosts
    )
    try:
        port, close_service = start_service(
            make_app(directory, registry, watch.unhealthy, token, watch.handle),
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
            return watch.follow(until_evaluated)
        finally:
            close_service()
    finally:
        close_metrics()


class Watch:
    """The main thread's work: look at the run directory, evaluate what is new, complete the summary at the end."""

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
        self._off = settings.why_not_evaluated()
        self.handle = ExplorerHandle()
        if self._off or not settings.monitor.latents_tokens:
            self.handle.disable(f"{self._off or 'monitor.latents_tokens is 0'}.")

    def follow(self, until_evaluated: bool) -> int:
        """Until `stop` is set or, if so asked, until the finished run is evaluated; returns the exit code."""
        if self._off:
            log.info("no evaluation: %s", self._off)
        while not self._stop.is_set():
            # The summary comes after the last snapshot: asked in this order, a finished run has shown it.
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
        moved_at = self._evaluator.moved_at if self._evaluator else None
        if moved_at is not None and time.monotonic() - moved_at > self._hang_seconds:
            return f"the evaluation has not moved for {time.monotonic() - moved_at:.0f} s"
        return None

    def alive(self) -> tuple[bool, str]:
        return (False, fault) if (fault := self.unhealthy()) else (True, self._off or "ok")

    def ready(self) -> tuple[bool, str]:
        return (False, missing) if (missing := why_not_ready(self._directory)) else (True, "ok")

    def _look(self, finished: bool) -> None:
        names = index_of(self._directory).names()
        self._metrics.set_run(len(names), int(names[-1]) if names else None, finished)
        if self._off or not (names or (self._directory / "metrics.jsonl").is_file()):
            return  # the language model is loaded while the run works towards its first snapshot, not before it begins
        if self._evaluator is None:
            self._evaluator = self._new_evaluator()
        from monitor.evaluation.follow import Stopped

        try:
            self._evaluator.look()
        except Stopped:
            log.info("stopped in the middle of an evaluation; the next start takes it up again")
        self._off = self._evaluator.broken

    def _new_evaluator(self) -> Evaluator:
        # On Linux, niceness is the thread's: this one and those that torch starts from it give way to the training,
        # the service's do not.
        os.nice(NICE)
        from monitor.evaluation.follow import Evaluator

        return Evaluator(self._settings, self._metrics, self._stop, self.handle)

    def _is_up_to_date(self) -> bool:
        return self._off is not None or self._evaluator is None or self._evaluator.is_up_to_date()
