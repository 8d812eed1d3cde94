"""What a trainer answers to /healthz and /readyz: (whether it holds, a sentence for people). Takes no locks."""

from __future__ import annotations

import time

from producer.common.shell import shell_command
from trainer.report import StepReport
from trainer.training.loop import Loop

WEDGED_SECONDS = 300.0
"""A step, a snapshot or a checkpoint that takes longer is taken for a hang; so is whatever else keeps the loop."""

STATES = {
    "filling": "filling the buffer",
    "starved": "starved: training waits for rows, the producers are too few or too slow",
    "paused": f"paused: `{shell_command('trainer', 'ctl', 'RUN_DIR', 'resume')}` goes on",
    "draining": "draining: no further row will come",
}
"""A state of the last report, in words where its name says too little."""


class TrainerHealth:
    """Alive: only a restart could help one that is not. Ready: producers that connect are given work.

    A trainer without rows is alive, for its producers may come back, and so is a paused one: the loop goes round every
    few seconds while it waits. It is dead when the loop no longer comes round, or when the stream's thread has ended.
    """

    def __init__(self) -> None:
        self._loop: Loop | None = None

    def watch(self, loop: Loop) -> None:
        self._loop = loop

    def alive(self) -> tuple[bool, str]:
        loop = self._loop
        if loop is None:
            return True, "starting"
        if (failure := loop.intake.failure) is not None:
            return False, f"the stream's thread has died: {failure!r}"
        if (still := time.monotonic() - loop.moved_at) > WEDGED_SECONDS:
            return False, f"the loop has stood still for {still:.0f} s"
        return True, _state(loop.last_report)

    def ready(self) -> tuple[bool, str]:
        alive, state = self.alive()
        if not alive:
            return False, state
        if self._loop is None:
            return False, "starting: the stream is not open yet"
        if self._loop.intake.is_winding_down:
            return False, "draining: producers are given no more work"
        return True, state


def _state(report: StepReport | None) -> str:
    if report is None:
        return "waiting for the first rows"
    return STATES.get(report.state, report.state)
