"""CONTRACT: the lifecycles of a run and of an SAE. They are the one answer to whether either is over.

The values are those of metrics, metrics.jsonl and `ctl status`. What may still come from the producers is
`StreamPhase` in `trainer.stream.ledger.phase`.
"""

from __future__ import annotations

from enum import StrEnum


class RunPhase(StrEnum):
    """The phase of a run at this moment."""

    WAITING = "waiting"
    """No producer has sent anything, so the shape of the stream is not known."""
    FILLING = "filling"
    """The buffer is being filled before the first step."""
    TRAINING = "training"
    STARVED = "starved"
    """The buffer is under half full, and training waits for the producers."""
    PAUSED = "paused"
    """No step until an operator resumes the run."""
    DRAINING = "draining"
    """No further activation will come; what is buffered is trained."""
    DRAINED = "drained"
    """Everything that was on its way when an operator asked for a drain is trained. The run is not complete."""
    FINISHED = "finished"
    """The token budget or the data is used up, or every SAE is finished."""

    @property
    def is_over(self) -> bool:
        """No further step will follow."""
        return self in (RunPhase.DRAINED, RunPhase.FINISHED)


REPORTED_PHASES = (RunPhase.FILLING, RunPhase.TRAINING, RunPhase.STARVED, RunPhase.PAUSED, RunPhase.DRAINING)
"""Phases of a report: none is made before the stream is known, and the last one tells what came before the end."""


class SaePhase(StrEnum):
    """The phase of an SAE at this moment, by the tokens that it has trained on."""

    JOINING = "waiting"
    """It has not trained on a single token."""
    WARMING_UP = "warming up"
    """Its learning rate rises."""
    CONSTANT = "constant"
    """Its learning rate is at its peak."""
    COOLING_DOWN = "cooling"
    """Its learning rate falls to zero."""
    LEAVING = "leaving"
    """It cools down, or has finished, and leaves the run once its last snapshot is published."""
    FINISHED = "finished"
    """Its budget or its cooldown is over: it trains no more, and costs nothing."""
