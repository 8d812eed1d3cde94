"""What every sparse autoencoder has: parameters, a gradient for a batch, an inference form.

Inside, both matrices have one row per latent, [d_sae, d_in], contiguous, so that everything after the encoder
touches rows only. Rows of x arrive scaled to a mean square norm of d_in; what is published takes raw activations.

    pre_acts = (x − b_dec) W_encᵀ + b_enc        latents = act(pre_acts)        x_hat = latents W_dec + b_dec

Gradients are written out by hand (algorithms.md §9a) and are tested against dense autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from trainer.kernels.sparse import Entries, Transposed, multiply
from trainer.settings import SaeSettings


@dataclass(frozen=True)
class Gradients:
    """What one batch says: the gradient of every parameter, and what statistics need."""

    of: dict[str, Tensor]
    loss: dict[str, Tensor]
    """Parts of the loss, scalars."""
    x_hat: Tensor
    """[batch, d_in], in the scale of x."""
    fired: Entries
    """Latents of the batch; an entry counts as fired when its value is positive."""


class Sae(ABC):
    """One autoencoder in training. `parameters` are float32 masters, changed in place by the optimizer."""

    matmul_dtype: torch.dtype = torch.float32

    def __init__(self, settings: SaeSettings, d_in: int) -> None:
        self.settings = settings
        self.d_in = d_in
        self.d_sae = settings.d_sae
        self.variance = 1.0
        """Frozen total variance of scaled x: the reconstruction loss is in units of it."""
        self.parameters: dict[str, Tensor] = {
            "W_enc": torch.zeros(self.d_sae, d_in),
            "W_dec": torch.zeros(self.d_sae, d_in),
            "b_enc": torch.zeros(self.d_sae),
            "b_dec": torch.zeros(d_in),
        }

    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Sets the parameters from a sample of scaled rows [rows, d_in]: centre, random directions, tied encoder."""
        W_dec = torch.randn(self.d_sae, self.d_in, generator=generator)
        normalise_rows(W_dec)
        self.parameters["W_dec"].copy_(W_dec)
        self.parameters["W_enc"].copy_(W_dec)
        self.parameters["b_dec"].copy_(geometric_median(x))
        self.variance = float((x - x.mean(0)).double().square().sum(1).mean())

    @abstractmethod
    def gradients(self, x: Tensor, dead: Tensor) -> Gradients:
        """The loss of a batch and its gradient. x [batch, d_in] scaled; dead [d_sae] bool: latents to revive."""

    @abstractmethod
    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """(SAELens' architecture keys, weights beside the four common ones), still in scaled units."""

    def after_step(self) -> None:
        """Restores what the optimizer does not know: decoder rows of unit norm."""
        normalise_rows(self.parameters["W_dec"])

    def pre_acts(self, x: Tensor, less: Tensor | float = 0.0) -> Tensor:
        """The one dense product of a step, [batch, d_sae], in `matmul_dtype`; `less` is subtracted on the way."""
        p, dtype = self.parameters, self.matmul_dtype
        # b_dec is subtracted in float32: in bfloat16 it would cost the digits that matter.
        return linear((x - p["b_dec"]).to(dtype), p["W_enc"].to(dtype), (p["b_enc"] - less).to(dtype))

    def decode(self, latents: Entries) -> Tensor:
        return multiply(latents, self.parameters["W_dec"]) + self.parameters["b_dec"]

    def encoder_gradients(self, by_latent: Transposed, dz: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Gradients of W_enc and b_enc, and the encoder's share of b_dec's, from ∂L/∂pre_acts at the entries."""
        db_enc = by_latent.sums(dz)
        dW_enc = by_latent.multiply(dz, x - self.parameters["b_dec"])
        # Σ_b −W_encᵀ g_b needs only the sum of g over the batch: two vectors instead of a dense product.
        return {"W_enc": dW_enc, "b_enc": db_enc, "b_dec": -(db_enc @ self.parameters["W_enc"])}


def normalise_rows(W: Tensor) -> None:
    """Scales each row to unit norm, in place."""
    W.div_(W.norm(dim=1, keepdim=True).clamp_min_(1e-12))


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the smallest sum of distances to the rows of x [rows, d_in]; Weiszfeld's iteration, float64.

    Unlike the mean it hardly notices outliers. Source: algorithms.md §2b (OpenAI's TopK recipe).
    """
    x = x.double()
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1.0 / (x - median).norm(dim=1).clamp_min_(1e-8)
        moved = weight @ x / weight.sum()
        change = (moved - median).norm() / median.norm().clamp_min(1e-12)
        median = moved
        if change < tolerance:
            break
    return median.float()


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
