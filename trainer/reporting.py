"""Where the loop's reports go: a line of metrics.jsonl each, Prometheus, and now and then the log."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.metrics import TrainerMetrics
from trainer.report import StepReport

log = logging.getLogger("sluice.trainer")

PROGRESS_SECONDS = 30.0
"""Between two lines of the log that tell how training goes."""


class Reports:
    """See the module's docstring. Closes metrics.jsonl on exit."""

    def __init__(self, directory: Path, metrics: TrainerMetrics) -> None:
        self.last: StepReport | None = None
        self._logged_at = time.monotonic()
        self._history = open(directory / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed on exit)
        self._metrics = metrics

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_: object) -> None:
        self._history.close()

    def waiting(self, report: StepReport) -> None:
        self._metrics.update(report)

    def report(self, report: StepReport) -> None:
        self._log(report, self.last)
        self.last = report
        self._metrics.update(report)
        self._append(json.dumps(_without_nan(report.as_json())).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        """A line of the history. A full disk costs it this line, never the training."""
        end = self._history.tell()
        try:
            if self._history.write(line) == len(line):
                return
            fault = "no space left on the disk"
        except OSError as error:
            fault = str(error)
        with suppress(OSError):
            self._history.truncate(end)  # half a line would spoil the next one
        log.error("metrics.jsonl not written: %s; training goes on", fault)

    def published(self, tokens: int) -> None:
        self._metrics.set_snapshot(tokens, time.time())
        log.info("snapshot of %s rows published", f"{tokens:,}")

    def _log(self, report: StepReport, before: StepReport | None) -> None:
        """A line for people: at once when something is wrong, every half minute when nothing is."""
        stream = report.stream
        if before is not None and (lost := stream.sessions_lost - before.stream.sessions_lost) > 0:
            log.warning("%d producer(s) lost; what they had leased goes to others", lost)
        if report.state == "starved" and (before is None or before.state != "starved"):
            at_work = sum(stream.producers.values())
            log.warning("the buffer is under half full and training waits; producers at work: %d", at_work)
        if time.monotonic() - self._logged_at >= PROGRESS_SECONDS:
            self._logged_at = time.monotonic()
            saes = " · ".join(f"{sae.name} fvu {sae.fvu:.4f} l0 {sae.l0:.1f}" for sae in report.saes)
            log.info("%s rows · %s/s · %s", f"{report.tokens:,}", f"{report.tokens_per_second:,.0f}", saes)
            log.info("%s", report.bottleneck)

    def saved(self) -> None:
        self._metrics.set_checkpoint_time(time.time())


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity; null stands for both."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
