"""The loop's listener: each report becomes a line of metrics.jsonl and of Prometheus, and now and then of the log."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.metrics import TrainerMetrics
from trainer.phases import RunPhase
from trainer.report import StepReport

log = logging.getLogger("sluice.trainer")

PROGRESS_SECONDS = 30.0
"""Between two lines of the log on the progress of training."""
STARVED_SECONDS = 600.0
"""Between two warnings that training waits. A run whose producers are its bottleneck starves again and again, and the
lines on its progress say so."""


class Reporter:
    """See the module's docstring. A context manager, which closes metrics.jsonl."""

    def __init__(self, directory: Path, metrics: TrainerMetrics) -> None:
        self.last: StepReport | None = None
        self._logged_at = time.monotonic()
        self._filled_rows = 0
        """Activations in the buffer at the last line that was written while it was being filled."""
        self._warned_at: float | None = None
        """When the log last said that training waits;"""
        self._starved = 0
        """how often it has begun to wait since then."""
        self._bottleneck = ""
        """The beginning of the last sentence on what holds up training: one that still holds is not logged again."""
        self._history = open(directory / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed on exit)
        self._metrics = metrics

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._history.close()

    def on_fill(self, report: StepReport) -> None:
        self._metrics.update(report)
        if report.buffer_rows != self._filled_rows:  # a trainer that waits for producers writes nothing
            self._filled_rows = report.buffer_rows
            self._append(_line(report))
        if time.monotonic() - self._logged_at >= PROGRESS_SECONDS:
            self._logged_at = time.monotonic()
            share = report.buffer_rows / report.buffer_capacity_rows
            log.info("the buffer is being filled: %s tokens, %.0f%%", f"{report.buffer_rows:,}", 100 * share)

    def on_report(self, report: StepReport) -> None:
        self._log(report, self.last)
        self.last = report
        self._metrics.update(report)
        self._append(_line(report))

    def _append(self, line: bytes) -> None:
        """Appends a line to metrics.jsonl. A full disk costs this line, never the training."""
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

    def on_publish(self, tokens: int) -> None:
        self._metrics.set_snapshot(tokens, time.time())
        log.info("published snapshot at %s tokens", f"{tokens:,}")

    def _log(self, report: StepReport, before: StepReport | None) -> None:
        """Logs at once what is wrong, and the progress every half minute."""
        stream = report.stream
        if before is not None and (lost := stream.sessions_lost - before.stream.sessions_lost) > 0:
            log.warning("%d producer(s) lost; what they had leased goes to others", lost)
        if report.state is RunPhase.STARVED and (before is None or before.state is not RunPhase.STARVED):
            self._warn_of_starvation(sum(stream.producers.values()))
        if time.monotonic() - self._logged_at >= PROGRESS_SECONDS:
            self._logged_at = time.monotonic()
            saes = " · ".join(f"{sae.name} fvu {sae.fvu:.4f} l0 {sae.l0:.1f}" for sae in report.saes)
            log.info("%s tokens · %s/s · %s", f"{report.tokens:,}", f"{report.tokens_per_second:,.0f}", saes)
            if (subject := report.bottleneck.partition(":")[0]) != self._bottleneck:
                self._bottleneck = subject
                log.info("%s", report.bottleneck)

    def _warn_of_starvation(self, producers: int) -> None:
        """Warns that training waits: at once, then every STARVED_SECONDS with the number of times."""
        self._starved += 1
        now = time.monotonic()
        if self._warned_at is not None and now - self._warned_at < STARVED_SECONDS:
            return
        times = f" ({self._starved} times since the last such line)" if self._starved > 1 else ""
        log.warning("the buffer is under half full and training waits%s; producers at work: %d", times, producers)
        self._warned_at, self._starved = now, 0

    def on_save(self) -> None:
        self._metrics.set_checkpoint_time(time.time())


def _line(report: StepReport) -> bytes:
    return json.dumps(_without_nan(report.as_json())).encode() + b"\n"


def _without_nan(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
