"""Published SAEs: weights and cfg.json, wherever they were published, and how their latents are computed.

An architecture's module defines the activations that its snapshots have; several architectures may share one (a
BatchTopK is published as a JumpReLU).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.saes import registry
from trainer.saes.folding import recentre

TRANSCODER = "transcoder"


class FormatError(ValueError):
    """A format cannot express what this SAE is."""


@dataclass(frozen=True)
class Published:
    """An SAE that takes raw activations, wherever it was published."""

    cfg: dict[str, Any]
    """As SAELens writes it, complete."""
    weights: dict[str, Tensor]
    """float32, one row per latent: W_enc [d_sae, d_in], W_dec [d_sae, d_out]."""

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

    def read_as(self, centred: bool) -> dict[str, Tensor]:
        """The weights for an encoder that subtracts b_dec from what it reads, or does not."""
        return recentre(self.weights, self.cfg["apply_b_dec_to_input"], centred)


class Activation(ABC):
    """How a published SAE turns pre-activations into latents, and how other libraries write such an SAE down.

    `weights` are as on disk: W_enc [d_in, d_sae], W_dec [d_sae, d_out]."""

    name: ClassVar[str]
    architecture: ClassVar[str]
    """`architecture` in the cfg.json of an autoencoder."""
    has_transcoder: ClassVar[bool] = True
    vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Names of its weights of length d_sae; the first is the bias of the pre-activations."""
    unit_rows: ClassVar[bool] = True
    """Decoder norms may be folded into the encoder: no choice of latents changes."""

    @abstractmethod
    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        """Pre-activations [..., d_sae] → latents [..., d_sae]."""

    @abstractmethod
    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        """How far the closest latent of each row of pre_acts [rows, d_sae] is from being chosen otherwise, [rows].

        Within rounding of it, another library's order of summation may choose otherwise; infinite where nothing jumps.
        """

    def fault(self, cfg: Mapping[str, Any], d_sae: int) -> str | None:
        """What is wrong with a cfg.json; None when nothing is."""
        return None

    # Other libraries' formats; an SAE that one of them cannot express raises FormatError

    def require_saelens(self, sae: Published) -> None:
        """Raises FormatError when SAELens has no such SAE."""
        return

    def as_jumprelu(self, sae: Published) -> Published:
        """The same function with a threshold per latent."""
        raise FormatError(f"{self.name} is no threshold per latent")

    def to_sparsify(self, sae: Published) -> dict[str, Any]:
        """The keys of sparsify's cfg.json that the activation decides."""
        raise FormatError("sparsify knows top-k by value only")

    def to_dictionary_learning(self, sae: Published) -> tuple[str, dict[str, Tensor]]:
        """(dictionary_learning's class, its state dict)"""
        raise FormatError(f"dictionary_learning has no {self.name}")


def distance_to_threshold(pre_acts: Tensor, threshold: Tensor | None, W_enc: Tensor) -> Tensor:
    """`Activation.margins` for latents that each compare with a threshold [d_sae], or with zero."""
    away = pre_acts.abs() if threshold is None else (pre_acts - threshold).abs() / (1 + threshold)
    # A latent that reads nothing, as after folding a decoder row of zeros, is never a close call.
    return away.masked_fill(~W_enc.any(0), torch.inf).amin(1)


def jumprelu_of(sae: Published, weights: dict[str, Tensor]) -> Published:
    """`weights` as those of a published JumpReLU."""
    name = f"jumprelu_{sae.architecture}" if sae.is_transcoder else "jumprelu"
    return Published(sae.cfg | {"architecture": name}, weights)


def transcoder_name(architecture: str, skip: bool) -> str:
    """The name that a transcoder has whose autoencoder is called `architecture`: SAELens' rule."""
    prefix = "" if architecture == "standard" else f"{architecture}_"
    return f"{prefix}{'skip_' if skip else ''}{TRANSCODER}"


def activation_of(architecture: str) -> Activation | None:
    """How a published SAE activates, by its architecture in cfg.json; None when that is not known."""
    for activation in registry.activations().values():
        if architecture in _names(activation):
            return activation
    return None


def published_architectures() -> list[str]:
    """Every name that `architecture` may have in cfg.json."""
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
