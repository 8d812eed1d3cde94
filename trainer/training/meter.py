"""Measurements between two reports: seconds, steps, rates."""

from __future__ import annotations

import time
from collections import deque

from trainer.phases import RunPhase
from trainer.report import StepReport
from trainer.stream.buffer import same_context_mates
from trainer.stream.intake import Intake
from trainer.training.run import Run

SHORTEST_INTERVAL_SECONDS = 1.0
"""A rate over less than this says little."""
RATE_SECONDS = 30.0
"""A rate is over about so long, where the run is as old: a slow run does not take a step in every interval."""


class Meter:
    """Counts steps and seconds since the last report, and tokens over the last half minute."""

    def __init__(self, tokens: int) -> None:
        self.begin(tokens)

    def begin(self, tokens: int) -> None:
        """Forgets earlier intervals, as after a pause, and begins one."""
        self._last_rate = 0.0
        self._marks: deque[tuple[float, int]] = deque()
        """Beginnings of the last intervals, and the tokens trained by then."""
        self._begin_interval(tokens)

    def _begin_interval(self, tokens: int) -> None:
        self._began_at = time.monotonic()
        self._marks.append((self._began_at, tokens))
        while len(self._marks) > 1 and self._marks[1][0] <= self._began_at - RATE_SECONDS:
            self._marks.popleft()
        self._steps = 0
        self._step_seconds = 0.0

    def count_step(self, seconds: float) -> None:
        self._steps += 1
        self._step_seconds += seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_at

    @property
    def step_seconds(self) -> float:
        """Mean duration of a step."""
        return self._step_seconds / max(self._steps, 1)

    def rate(self, tokens: int) -> float:
        """Tokens per second over the last RATE_SECONDS; `tokens` are those trained by now."""
        began_at, tokens_at_begin = self._marks[0]
        return (tokens - tokens_at_begin) / max(time.monotonic() - began_at, 1e-9)

    def recent_rate(self, tokens: int) -> float:
        """Like `rate`; just after a report, the rate in that report."""
        return self.rate(tokens) if self.seconds > SHORTEST_INTERVAL_SECONDS else self._last_rate

    def restart(self, tokens: int) -> None:
        """Begins a new interval; the rate of the last one is kept for `recent_rate`."""
        self._last_rate = self.recent_rate(tokens)
        self._begin_interval(tokens)


def measure(run: Run, intake: Intake, meter: Meter) -> StepReport:
    """The state of the run, with rates since the meter's last restart. Changes nothing."""
    buffer, tokens, batch = intake.buffer_report(), intake.tokens_trained, run.last_batch
    return StepReport(
        time=time.time(),
        tokens=tokens,
        step=run.step,
        target_tokens=run.settings.run.tokens,
        tokens_per_second=meter.rate(tokens),
        step_seconds=meter.step_seconds,
        data_wait_seconds=buffer.data_wait_seconds,
        state=RunPhase.PAUSED if run.roster.paused else buffer.phase,
        buffer_rows=buffer.rows,
        buffer_capacity_rows=buffer.capacity,
        same_context_mates=float("nan") if batch is None else same_context_mates(batch, run.stream.context),
        stream=intake.stream_report(),
        saes=run.reports(),
        ranks=run.ranks_report(),
    )
