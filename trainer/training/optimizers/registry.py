"""The optimizers, by the value of `optimizer` in [[sae]]. Light: a class is imported at its first look-up.

To add one, write its module, add its line to `OPTIMIZERS` and its name to `SaeSettings.optimizer`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer, and what a step with it costs."""

    path: str
    """MODULE:CLASS, a subclass of `trainer.training.optimizers.base.Optimizer`."""
    rate_factor: float
    """Its default learning rate, in units of Adam's."""
    moments: int
    """Tensors that it keeps for each weight matrix."""
    bytes: float
    """Bytes that a step moves for each element of a matrix, its gradient read and its weight written included."""
    products: int = 0
    """Products of the cost of X W [n, d] with a matrix [d, d], for each weight matrix."""


OPTIMIZERS = {
    "adam": OptimizerEntry("trainer.training.optimizers.adam:Adam", 1.0, moments=2, bytes=28),
    "signum": OptimizerEntry("trainer.training.optimizers.signum:Signum", 3.0, moments=1, bytes=20),
    "muon": OptimizerEntry("trainer.training.optimizers.muon:Muon", 1.0, moments=1, bytes=52, products=2),
}


def optimizer_class(name: str) -> Any:
    """The class of an optimizer, a `type[Optimizer]`."""
    module, cls = OPTIMIZERS[name].path.split(":")
    return getattr(importlib.import_module(module), cls)
