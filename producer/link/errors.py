"""The ways in which a session or the whole run ends for a producer."""

from __future__ import annotations


class SessionLost(Exception):
    """The session of this lease is over: drop the shard and ask for the next lease."""


class Finished(Exception):
    """The run is over: there are no more leases."""


class RefusedByTrainer(Exception):
    """The trainer will never accept this producer. The message says why."""


class NoTrainer(Exception):
    """No trainer answered for stream.patience_seconds. The message says what to do."""
