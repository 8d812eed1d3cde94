"""What a person chose for a tuning. Light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Loss = Literal["kl", "kl+mse"]
LOSSES: tuple[Loss, ...] = ("kl", "kl+mse")


class TuningError(ValueError):
    """A tuning cannot be made, or not with these options; `str(error)` says what to change."""


@dataclass(frozen=True)
class TuningOptions:
    """Options that decide the result; a tuning that goes on must have those that it was begun with."""

    sae: str
    snapshot: str
    """Name of the snapshot that has the SAE to begin with."""
    tokens: int
    """Activations to train on."""
    loss: Loss
    learning_rate: float
    """At the peak."""
    batch: int
    """Positions of the windows in one step."""
    evaluation_tokens: int
    """Held-out activations that it is measured on, before and after."""
