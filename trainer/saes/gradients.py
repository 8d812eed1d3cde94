"""The results of a forward and a backward pass over one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trainer.kernels.select import Latents
from trainer.saes.settings import SHARED_PARAMETERS

THROUGH_ENCODER = "b_dec through the encoder"
"""Beside gradients while several ranks share an SAE: the part of b_dec's from each block of a rank's latents, [blocks,
d]. `Sae.sum_shared` sums it over all ranks."""


OutputLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(y_hat [batch, d_out], its squared error in units of variance, the gradient of that by y_hat) → the loss to train on
and its gradient by y_hat."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of one batch, with what statistics need of its forward pass."""

    of: dict[str, Tensor]
    """By the name of the parameter; of per-latent parameters the rows of this rank."""
    loss: dict[str, Tensor]
    """Parts of the loss, scalars."""
    y_hat: Tensor
    """[batch, d_out], in the scale of y."""
    fired: Latents
    """Active latents of the batch that this rank holds, in segments when there are several levels; those other than
    zero have fired."""


@dataclass(frozen=True)
class Reconstruction:
    """y_hat from a set of latents, with the gradient of its loss L."""

    y_hat: Tensor
    """[batch, d_out]"""
    loss: Tensor
    dlevels: Tensor
    """∂L/∂(latents W_dec) [levels × batch, d_out], one block per segment of the latents."""
    dy_hat: Tensor
    """∂L/∂y_hat summed over levels, [batch, d_out]: the gradient that reaches b_dec and W_skip."""
    dlatents: Tensor
    """∂L/∂latents at the entries. Dense latents have values beside their entries too, which the caller sets to zero."""


def add(grads: dict[str, Tensor], more: dict[str, Tensor], latents: Tensor | None = None) -> None:
    """Adds gradients in place; rows of `more` stand for the latents [n] with these indices, or for all."""
    for name, value in more.items():
        if name not in grads:
            grads[name] = value
        elif latents is None or name in SHARED_PARAMETERS or name == THROUGH_ENCODER:
            grads[name] += value
        else:
            grads[name].index_add_(0, latents, value)
