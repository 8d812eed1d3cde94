"""Published SAEs: weights and cfg.json of any library that is read here, and how latents are computed from them.

The module of an architecture defines the `Activation` of its snapshots; several architectures may share one, as a
BatchTopK is published as a JumpReLU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trainer.saes import registry
from trainer.saes.folding import recentre

TRANSCODER = "transcoder"
ALL_LATENTS = slice(None)


class FormatError(ValueError):
    """A format cannot express this SAE."""


@dataclass(frozen=True)
class SaeWeights:
    """A published SAE to convert or to start from; `InferenceSae` is one to run."""

    cfg: dict[str, Any]
    """cfg.json with all keys that SAELens writes."""
    weights: dict[str, Tensor]
    """For raw activations; float32, one row per latent: W_enc [d_sae, d_in], W_dec [d_sae, d_out]."""

    @property
    def architecture(self) -> str:
        return str(self.cfg["architecture"])

    @property
    def activation(self) -> Activation:
        activation = activation_of(self.architecture)
        assert activation is not None
        return activation

    @property
    def is_transcoder(self) -> bool:
        return self.architecture.endswith(TRANSCODER)

    @property
    def d_sae(self) -> int:
        return self.weights["W_enc"].shape[0]

    @property
    def d_in(self) -> int:
        return self.weights["W_enc"].shape[1]

    @property
    def d_out(self) -> int:
        return self.weights["W_dec"].shape[1]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.cfg["metadata"]

    def recentred(self, centred: bool) -> dict[str, Tensor]:
        """The weights for an encoder that subtracts b_dec from what it reads, or does not."""
        return recentre(self.weights, self.cfg["apply_b_dec_to_input"], centred)


class Activation(ABC):
    """The activation function of a published SAE, and the form that other libraries give to such an SAE.

    `weights` are those of an `InferenceSae`: W_enc [d_in, d_sae], W_dec [d_sae, d_out].
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    """`architecture` in the cfg.json of an autoencoder."""
    has_transcoder: ClassVar[bool] = True
    vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Names of its weights of length d_sae; the first is the bias of the pre-activations."""
    is_tied: ClassVar[bool] = False
    """W_enc is W_decᵀ, and is not stored; there is no bias of the pre-activations."""
    unit_rows: ClassVar[bool] = True
    """Decoder norms may be folded into the encoder: no choice of latents changes."""
    decided_by: ClassVar[Literal["latent", "largest", "row"]] = "row"
    """What decides whether a latent is active: itself; whether it is among the k largest of its row (`k` in cfg.json);
    or all of the row in another way. The first two are computed on a part of the latents at a time."""
    by_magnitude: ClassVar[bool] = False
    """Of the k largest: by magnitude, and signs are kept."""

    @abstractmethod
    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        """Pre-activations [..., d_sae] → latents [..., d_sae]."""

    @abstractmethod
    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        """The least change of a pre-activation that switches a latent on or off, for each row of [rows, d_sae].

        Where it is as small as rounding, another library may activate other latents; infinite where nothing jumps.
        """

    def fault(self, cfg: Mapping[str, Any], d_sae: int) -> str | None:
        """The fault of a cfg.json; None when it has none."""
        return None

    # Formats of other libraries; each raises FormatError for an SAE that the format cannot express

    def require_saelens(self, sae: SaeWeights) -> None:
        """Raises FormatError when SAELens has no such SAE."""
        return

    def as_jumprelu(self, sae: SaeWeights) -> SaeWeights:
        """The same function as a JumpReLU, with a threshold per latent."""
        raise FormatError(f"{self.name} is no threshold per latent")

    def to_sparsify(self, sae: SaeWeights) -> dict[str, Any]:
        """The keys of sparsify's cfg.json that the activation decides."""
        raise FormatError("sparsify knows top-k by value only")

    def to_dictionary_learning(self, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        """(dictionary_learning's class, its state dict)"""
        raise FormatError(f"dictionary_learning has no {self.name}")


def distance_to_threshold(pre_acts: Tensor, threshold: Tensor | None, W_enc: Tensor) -> Tensor:
    """`Activation.margins` of latents that are compared with a threshold [d_sae], or with zero."""
    distance = pre_acts.abs() if threshold is None else (pre_acts - threshold).abs() / (1 + threshold)
    # A latent whose encoder is zero, as after folding a decoder row of zeros, never switches.
    return distance.masked_fill(~W_enc.any(0), torch.inf).amin(1)


def jumprelu_of(sae: SaeWeights, weights: dict[str, Tensor]) -> SaeWeights:
    """`sae` as a published JumpReLU with these weights."""
    name = f"jumprelu_{sae.architecture}" if sae.is_transcoder else "jumprelu"
    return SaeWeights(sae.cfg | {"architecture": name}, weights)


def transcoder_name(architecture: str, skip: bool) -> str:
    """SAELens' name for a transcoder of the autoencoder `architecture`."""
    prefix = "" if architecture == "standard" else f"{architecture}_"
    return f"{prefix}{'skip_' if skip else ''}{TRANSCODER}"


def activation_of(architecture: str) -> Activation | None:
    """The activation of a published SAE, by its architecture in cfg.json; None when that is not known."""
    for activation in registry.activations().values():
        if architecture in _names(activation):
            return activation
    return None


def published_architectures() -> list[str]:
    """All values of `architecture` in cfg.json that are known."""
    return [name for activation in registry.activations().values() for name in _names(activation)]


def _names(activation: Activation) -> Iterator[str]:
    yield activation.architecture
    if activation.has_transcoder:
        yield transcoder_name(activation.architecture, skip=False)
        yield transcoder_name(activation.architecture, skip=True)


# State dicts of dictionary_learning


def linear_state(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of two torch.nn.Linear and a decoder bias."""
    return {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "b_dec": w["b_dec"],
    }


def matrix_state(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under SAELens' names, the encoder transposed as there."""
    return {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}


def scalar_state(k: int, threshold: Tensor) -> dict[str, Tensor]:
    """k and the one threshold of a (Batch)TopK."""
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold.clone()}
