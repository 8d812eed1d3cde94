"""The lifecycle of the stream: the one answer to what may still come."""

from __future__ import annotations

from enum import Enum


class StreamPhase(Enum):
    """How much is still to come from the stream. A run goes down this list; `retry_quarantined` takes it up again."""

    OPEN = "open"
    """Shards are leased and credit is granted."""
    WINDING_DOWN = "winding down"
    """Nothing is leased or granted any more; chunks under the credit granted before still arrive."""
    DRAINING = "draining"
    """No further activation arrives; the buffered ones are being trained."""
    WOUND_DOWN = "wound down"
    """The trainer was asked to leave: all that arrived is trained, and data is left."""
    EXHAUSTED = "exhausted"
    """Every activation of the data is trained, quarantined or dropped."""

    @property
    def is_receiving(self) -> bool:
        """Further activations may arrive."""
        return self in (StreamPhase.OPEN, StreamPhase.WINDING_DOWN)

    @property
    def is_over(self) -> bool:
        """Nothing is left to train on, here or on its way."""
        return self in (StreamPhase.WOUND_DOWN, StreamPhase.EXHAUSTED)
