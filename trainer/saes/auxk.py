"""AuxK: dead latents explain what the others leave over (Gao et al. 2024, arXiv 2406.04093).

L_aux = w_aux · |e_hat − e|² / |e − mean(e)|²,  e = y − y_hat held constant,
e_hat = ReLU(TopK_{k_aux}(pre_acts of dead latents)) W_dec, without b_dec
"""

from __future__ import annotations

import math

from torch import Tensor

from trainer.kernels.select import largest, widen
from trainer.saes.base import Sae
from trainer.saes.encoder import Encoded
from trainer.saes.gradients import add


def add_auxk(
    sae: Sae,
    grads: dict[str, Tensor],
    losses: dict[str, Tensor],
    encoded: Encoded,
    y: Tensor,
    y_hat: Tensor,
    offset: Tensor | None = None,
) -> None:
    """Adds the loss "auxiliary" to `losses` and its gradients to `grads`, with revive = "auxk".

    Nothing is added when no latent is dead or no residual is left. `offset` [d_sae] is what `encoded` lacks of the
    pre_acts.
    """
    if sae.settings.revival != "auxk" or not len(encoded.aux_latents):
        return
    k_aux = min(sae.settings.k_aux or max(1, sae.d_in // 2), len(encoded.aux_latents))
    indices, pre_acts = encoded.padded(0.0 if sae.by_magnitude else -math.inf)  # never among the largest
    error = y - y_hat
    spread = (error - error.mean(0)).square().sum()
    if not spread > 0:
        return
    weight, W_dec = sae.settings.aux_weight, sae.operand("W_dec")[indices]
    pre_acts = pre_acts if offset is None else widen(pre_acts) + offset[indices]
    latents = largest(pre_acts, k_aux, magnitude=sae.by_magnitude, dense_above=sae.dense_above)
    difference = latents.multiply(W_dec) - error
    de_hat = difference * (2.0 * weight / spread)
    dz = latents.sample(de_hat, W_dec).mul_(latents.value != 0)
    add(grads, sae.backward(encoded.inputs, latents, dz, de_hat, indices), indices)
    losses["auxiliary"] = weight * difference.square().sum() / spread
