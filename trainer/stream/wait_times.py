"""The time that training waits for activations, and producers for room in the buffer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from trainer.stream.ledger.sessions import Session

WINDOW = 10
"""Seconds over which ratios are taken."""


class WaitTimes:
    """Seconds of waiting since the start, and their share of the last WINDOW seconds."""

    def __init__(self) -> None:
        self.data_seconds = 0.0
        """Seconds in which training waited for activations."""
        self._credit_seconds = 0.0
        """Seconds in which every producer with a lease lacked credit."""
        self._updated_at = time.monotonic()
        self._samples = deque([(self._updated_at, 0.0, 0.0)], maxlen=WINDOW + 1)
        """(when, data seconds, credit seconds until then), a second apart."""

    def add_data_wait(self, seconds: float) -> None:
        """Adds a wait of training for activations."""
        self.data_seconds += seconds

    def update(self, sessions: Iterable[Session]) -> bool:
        """Adds the time since the last call to the wait for credit, if producers wait for it. True once a second."""
        now = time.monotonic()
        working = [session for session in sessions if session.leases]
        if working and not any(session.credit_tokens for session in working):
            self._credit_seconds += now - self._updated_at
        self._updated_at = now
        if now - self._samples[-1][0] < 1.0:
            return False
        self._samples.append((now, self.data_seconds, self._credit_seconds))
        return True

    def ratios(self) -> tuple[float, float]:
        """(wait for data, wait for credit), as shares of the last WINDOW seconds."""
        (start, data, credit), (now, data_now, credit_now) = self._samples[0], self._samples[-1]
        elapsed = max(now - start, 1e-9)
        return min(1.0, (data_now - data) / elapsed), min(1.0, (credit_now - credit) / elapsed)
