"""AuxK: dead latents explain what the others leave over (Gao et al. 2024, arXiv 2406.04093).

L_aux = w_aux · |e_hat − e|² / |e − mean(e)|²,  e = y − y_hat held constant,
e_hat = ReLU(TopK_{k_aux}(pre_acts of dead latents)) W_dec, without b_dec
"""

from __future__ import annotations

import math

from torch import Tensor

from trainer.kernels.select import candidates, largest, widen
from trainer.parallel import products
from trainer.parallel.blocks import blocks_of_subset, segment_ends
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

    Nothing is added when no latent of any rank is dead or no residual is left. `offset` [latents of this rank] is what
    `encoded` lacks of the pre_acts. Collective.
    """
    if sae.settings.revival != "auxk":
        return
    dead = len(encoded.aux_latents)
    dead_in_all = sae.ranks.count(dead)
    if not dead_in_all:
        return
    k_aux = min(sae.settings.k_aux or max(1, sae.d_in // 2), dead_in_all)
    indices, pre_acts = sae.padded(encoded, 0.0 if sae.by_magnitude else -math.inf)  # never among the largest
    error = y - y_hat
    spread = (error - error.mean(0)).square().sum()
    if not spread > 0:
        return
    weight, W_dec = sae.settings.aux_weight, sae.operand("W_dec")[indices]
    pre_acts = pre_acts if offset is None else widen(pre_acts) + offset[indices]
    blocks = blocks_of_subset(sae.blocks, indices)
    if sae.ranks.is_whole:
        latents = largest(pre_acts, k_aux, magnitude=sae.by_magnitude, dense_above=sae.dense_above)
    else:
        own = candidates(pre_acts, min(k_aux, dead), sae.by_magnitude)
        latents = sae.choose_largest(own, k_aux, indices[own.column] + sae.latents.start).split(segment_ends(blocks))
    difference = products.multiply(sae.ranks, latents, W_dec, blocks, len(y))[0] - error
    de_hat = difference * (2.0 * weight / spread)
    if dead:
        dz = products.sample(latents, de_hat, W_dec, blocks, len(y)).mul_(latents.value != 0)
        add(grads, sae.backward(encoded.inputs, latents, dz, de_hat, indices), indices)
    losses["auxiliary"] = weight * difference.square().sum() / spread
