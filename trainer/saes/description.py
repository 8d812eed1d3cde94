"""CONTRACT: a published SAE in words: its equations, in training and at inference, and whether SAELens loads it.

The equations of an architecture stand in the docstring of its module, and nowhere else: they are read from there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.saes import registry
from trainer.saes.published import Activation, FormatError, SaeWeights, activation_of


@dataclass(frozen=True)
class Equations:
    """What an SAE computes."""

    training: str | None
    """The architecture's name, and the paper it is from; None for an SAE that was not trained here."""
    training_equations: str
    inference: str
    """The equations of the published weights."""
    activation: str
    """The activation function at inference, in words."""


def equations_of(cfg: Mapping[str, Any], weight_names: frozenset[str]) -> Equations:
    """The equations of a published SAE with this cfg.json and weights of these names. Raises KeyError."""
    activation = activation_of(str(cfg["architecture"]))
    if activation is None:
        raise KeyError(cfg["architecture"])
    trained = registry.find(cfg.get("metadata", {}).get("training_architecture"))
    docstring = inspect.getdoc(sys.modules[trained.__module__]) if trained is not None else None
    title, _, rest = (docstring or "").partition("\n")
    is_centred = cfg.get("apply_b_dec_to_input", True)
    has_skip = "W_skip" in weight_names
    return Equations(
        training=title.rstrip(".:") or None,
        training_equations=_indented(rest),
        inference="\n".join(
            (
                f"pre_acts = {'(x − b_dec)' if is_centred else 'x'} {_encoder(activation)}",
                f"latents  = {activation.name}(pre_acts)",
                f"x_hat    = latents W_dec + b_dec{' + x W_skipᵀ' if has_skip else ''}",
            )
        ),
        activation=f"{activation.name}: {(inspect.getdoc(activation) or '').rstrip('.')}",
    )


def _encoder(activation: Activation) -> str:
    return "W_decᵀ" if activation.is_tied else f"W_enc + {activation.vectors[0]}"


def is_in_saelens(cfg: Mapping[str, Any]) -> bool:
    """Whether SAELens has a class for an SAE with this cfg.json."""
    sae = SaeWeights(dict(cfg), {})
    if (activation := activation_of(sae.architecture)) is None:
        return False
    try:
        activation.require_saelens(sae)
    except FormatError:
        return False
    return True


def _indented(text: str) -> str:
    """The indented lines of a docstring, which are its equations; one empty line between blocks."""
    lines = [line[4:] if line.startswith("    ") else "" for line in text.splitlines()]
    blocks = "\n".join(lines).split("\n\n")
    return "\n\n".join(block.strip("\n") for block in blocks if block.strip())
