"""The registry of architectures. To add one, write its module and add its line to `ARCHITECTURES`.

Settings, training, publishing, conversion and estimates look architectures up here; none of them has a list of its own.
A module is imported at the first look-up of its architecture.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

ARCHITECTURES: dict[str, str | type] = {
    "topk": "trainer.saes.architectures.topk:TopK",
    "batchtopk": "trainer.saes.architectures.batchtopk:BatchTopK",
    "jumprelu": "trainer.saes.architectures.jumprelu:JumpReLU",
    "relu": "trainer.saes.architectures.relu:ReLU",
    "p_anneal": "trainer.saes.architectures.p_anneal:PAnneal",
    "tied": "trainer.saes.architectures.tied:Tied",
    "gated": "trainer.saes.architectures.gated:Gated",
    "matching_pursuit": "trainer.saes.architectures.matching_pursuit:MatchingPursuit",
    "repair": "trainer.saes.architectures.repair:Repair",
}
"""Subclasses of `trainer.saes.base.Sae`, or MODULE:CLASS, by the value of `architecture` in a run file."""


def names() -> list[str]:
    """The names of all architectures."""
    return list(ARCHITECTURES)


def get(name: str) -> Any:
    """The class of an architecture, a `type[Sae]`. Raises KeyError."""
    entry = ARCHITECTURES[name]
    return _load(entry) if isinstance(entry, str) else entry


def find(name: Any) -> Any | None:
    """The class of an architecture; None for an unknown name."""
    return get(name) if isinstance(name, str) and name in ARCHITECTURES else None


def is_key(key: str) -> bool:
    """The settings of some architecture have this key."""
    return any(key in get(name).Settings.model_fields for name in ARCHITECTURES)


def activations() -> dict[str, Any]:
    """The `Activation` of published autoencoders, by their architecture in cfg.json."""
    return {activation.architecture: activation for name in ARCHITECTURES for activation in get(name).activations}


@cache
def _load(entry: str) -> Any:
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)
