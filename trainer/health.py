"""The trainer's answers to /healthz and /readyz: (whether it holds, a sentence for people). Takes no locks."""

from __future__ import annotations

import time

from producer.common.formatting import format_duration
from producer.common.shell import shell_command
from trainer.phases import RunPhase
from trainer.report import StepReport
from trainer.training.loop import Loop

HANG_SECONDS = 300.0
"""A turn of the loop that takes longer, with its step, snapshot or checkpoint, counts as a hang."""

SENTENCES = {
    RunPhase.FILLING: "filling the buffer",
    RunPhase.STARVED: "starved: training waits for activations, the producers are too few or too slow",
    RunPhase.PAUSED: f"paused: `{shell_command('trainer', 'ctl', 'RUN_DIR', 'resume')}` goes on",
    RunPhase.DRAINING: "draining: no further activation will come",
}
"""Phases whose names say too little."""


class TrainerHealth:
    """Alive: only a restart could help one that is not. Ready: producers that connect are given work.

    A trainer without activations is alive, for its producers may come back, and so is a paused one: the loop turns
    every few seconds while it waits. It is dead when the loop no longer turns, or when the stream's thread has ended.
    """

    def __init__(self, hang_seconds: float = HANG_SECONDS) -> None:
        self._hang_seconds = hang_seconds
        self._loop: Loop | None = None

    def watch(self, loop: Loop) -> None:
        self._loop = loop

    def alive(self) -> tuple[bool, str]:
        loop = self._loop
        if loop is None:
            return True, "starting"
        if (failure := loop.intake.failure) is not None:
            return False, f"the stream's thread has died: {failure!r}"
        if (seconds := time.monotonic() - loop.moved_at) > self._hang_seconds:
            return False, f"the loop has stood still for {format_duration(seconds)}"
        return True, _sentence(loop.last_report)

    def ready(self) -> tuple[bool, str]:
        is_alive, sentence = self.alive()
        if not is_alive:
            return False, sentence
        if self._loop is None:
            return False, "starting: the stream is not open yet"
        if self._loop.intake.is_winding_down:
            return False, "draining: producers are given no more work"
        return True, sentence


def _sentence(report: StepReport | None) -> str:
    if report is None:
        return "waiting for the first activations"
    return SENTENCES.get(report.state, report.state)
