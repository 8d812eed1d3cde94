"""Inference with a published SAE: raw activations → latents → reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.saes.hooks import SaeHooks
from trainer.saes.published import TRANSCODER, Activation, activation_of, published_architectures
from trainer.snapshot import SnapshotError, read_sae


class InferenceSae:
    """A published SAE to run: raw activations → latents in the same units → reconstruction, all float32.

    `W_enc` [d_in, d_sae] and `W_dec` [d_sae, d_out], as on disk. x is the activations at `hooks.reads` side by side.
    """

    def __init__(self, cfg: dict[str, Any], weights: dict[str, Tensor], name: str = "sae") -> None:
        self.name = name
        self.cfg = cfg
        self.weights = weights
        architecture = cfg["architecture"]
        self.activation = activation = require_activation(cfg)
        self.hooks = SaeHooks.from_metadata(cfg.get("metadata", {}))
        self.centred = bool(cfg.get("apply_b_dec_to_input", not architecture.endswith(TRANSCODER)))
        self.W_dec, self.b_dec = weights["W_dec"], weights["b_dec"]
        self.W_enc = self.W_dec.T if activation.is_tied else weights["W_enc"]
        self.b_enc = self.W_dec.new_zeros(()) if activation.is_tied else weights[activation.vectors[0]]
        self.threshold, self.W_skip = weights.get("threshold"), weights.get("W_skip")

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def input(self, activations: Mapping[str, Tensor]) -> Tensor:
        """x [n, d_in] from the activations [n, width] of each hook."""
        return torch.cat([activations[hook] for hook in self.hooks.reads], 1)

    def pre_acts(self, x: Tensor) -> Tensor:
        """[..., d_in] → [..., d_sae]; of a gated SAE, those of the gate."""
        return (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Raw activations [..., d_in] → latents [..., d_sae]."""
        return self.activation.encode(self.pre_acts(x), self.weights, self.cfg)

    def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
        """Latents [..., d_sae] → reconstruction [..., d_out]; a skip transcoder needs the x they came from."""
        y_hat = latents @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return y_hat
        if x is None:
            raise ValueError("a skip transcoder's reconstruction needs x: decode(latents, x)")
        return y_hat + x @ self.W_skip.T

    def __call__(self, x: Tensor) -> Tensor:
        """Raw activations [..., d_in] → reconstruction [..., d_out]."""
        return self.decode(self.encode(x), x)


def require_activation(cfg: Mapping[str, Any]) -> Activation:
    """The activation of a published SAE. Raises SnapshotError when it is not known."""
    architecture = cfg["architecture"]
    if (activation := activation_of(architecture)) is None:
        raise SnapshotError(
            f"architecture {architecture!r} is not known; known are {', '.join(published_architectures())}"
        )
    return activation


def load_sae(folder: Path, device: torch.device | str = "cpu") -> InferenceSae:
    """The SAE in one folder of a snapshot, in float32. Raises SnapshotError when it is not one this version knows."""
    cfg, arrays = read_sae(folder)
    weights = {name: torch.from_numpy(array).float().to(device) for name, array in arrays.items()}
    return InferenceSae(cfg, weights, folder.name)
