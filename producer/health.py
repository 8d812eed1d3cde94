"""A producer's answers to /healthz and /readyz: (whether it holds, a sentence for people)."""

from __future__ import annotations

import time

from producer.common.formatting import format_duration
from producer.link import Link


class ProducerHealth:
    """Alive: the loop moves, if only to wait for a trainer, a lease or credit. Ready: a trainer has welcomed it.

    The loop hangs when one forward pass or one shard's text takes longer than `stall_seconds`: the trainer has given
    its lease to others by then.
    """

    def __init__(self, link: Link, stall_seconds: float) -> None:
        self._link = link
        self._stall_seconds = stall_seconds

    def alive(self) -> tuple[bool, str]:
        if (idle_seconds := time.monotonic() - self._link.moved_at) > self._stall_seconds:
            return (
                False,
                f"the loop has not moved for {format_duration(idle_seconds)}: "
                "one forward pass, or reading one shard, hangs",
            )
        return True, self._link.state

    def ready(self) -> tuple[bool, str]:
        alive, state = self.alive()
        if alive and state == "connecting":
            return False, f"{state}: no trainer has welcomed this producer yet"
        return alive, state
