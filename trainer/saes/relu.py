"""ReLU with a penalty on the size of its latents: the classic SAE.

    latents = ReLU(pre_acts)                                    y_hat = latents W_dec + b_dec
    L = (|y − y_hat|² + w · penalty) / variance

    penalty = Σ_i latents_i                       l1: decoder rows of unit norm (Bricken et al. 2023)
            | Σ_i latents_i |W_dec,i|             l1_norm: norms free, folded at export (Anthropic, April 2024)
            | Σ_i tanh(c · latents_i |W_dec,i|)   tanh: large latents are not held down (Anthropic, February 2024)

A crosscoder's |W_dec,i| is the sum of the norms at its hooks, so that a latent pays for each hook it writes to
(Anthropic, October 2024). The penalty shrinks every latent, by w/2 for l1 and an orthogonal decoder; `repair.py`
mends that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.select import Latents, positive
from trainer.saes.base import Gradients, Sae, add
from trainer.settings import SaeSettings


class ReLU(Sae):
    """See the module's docstring."""

    def __init__(self, settings: SaeSettings, widths: tuple[int, ...], d_out: int | None = None) -> None:
        super().__init__(settings, widths, d_out)
        self.unit_decoder = self.unit_decoder and settings.sparsity == "l1"

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        encoded = self.encode(x, self.revived(dead), positive)
        latents = encoded.latents[0]
        main = self.reconstruct(latents, x, y)
        losses = {"reconstruction": main.loss}
        losses["sparsity"], through_value, dW_dec = self._penalty(latents, sparsity / len(x))
        dz = (main.dlatents + through_value) * (latents.value > 0)
        grads = self.backward(encoded.read, latents, dz, main.rows)
        add(grads, self.output_gradients(x, main.total))
        if dW_dec is not None:
            grads["W_dec"] += dW_dec
        self.auxiliary(grads, losses, encoded, y, main.y_hat)
        return Gradients(grads, losses, main.y_hat, latents)

    def _penalty(self, latents: Latents, sparsity: float) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """(loss, ∂L/∂latents at the entries, ∂L/∂W_dec or None) of what makes it sparse."""
        assert self.settings.sparsity_weight is not None
        weight = sparsity * self.settings.sparsity_weight / self.variance
        if self.settings.sparsity == "l1":
            return weight * latents.value.sum(), weight, None
        norms, directions = self._decoder_norms()
        size = latents.value * latents.at(norms)
        if self.settings.sparsity == "l1_norm":
            dnorms = latents.transpose().sums(latents.value)
            return weight * size.sum(), weight * latents.at(norms), weight * dnorms[:, None] * directions
        c = self.settings.tanh_scale
        tanh = (c * size).tanh()
        slope = c * (1 - tanh.square())
        dnorms = latents.transpose().sums(latents.value * slope)
        return weight * tanh.sum(), weight * slope * latents.at(norms), weight * dnorms[:, None] * directions

    def _decoder_norms(self) -> tuple[Tensor, Tensor]:
        """(|W_dec,i| summed over hooks [d_sae], its derivative by W_dec [d_sae, d_out])."""
        blocks = self.W_dec.split(self.widths if not self.is_transcoder else self.d_out, 1)
        norms = [block.norm(dim=1, keepdim=True) for block in blocks]
        directions = [block / norm.clamp_min(1e-12) for block, norm in zip(blocks, norms, strict=True)]
        return torch.cat(norms, 1).sum(1), torch.cat(directions, 1)

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        return {"architecture": "standard"}, self.common_weights()
