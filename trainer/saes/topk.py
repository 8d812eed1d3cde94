"""TopK with AuxK (Gao et al. 2024, arXiv 2406.04093).

    latents = ReLU(TopK_k(pre_acts))                            y_hat = latents W_dec + b_dec
    L = |y − y_hat|² / variance + w_aux · |e_hat − e|² / |e − mean(e)|² (+ w_multi · |y − y_hat_{4k}|² / variance)

`variance` is frozen at the start, so that the loss is FVU and its scale never depends on a batch. The auxiliary loss
is `Sae.auxiliary`; w_aux = 1/32. Multi-TopK decodes the same pre_acts once more with 4 k latents, w_multi = 1/8 in
the source. With `abs`, TopK chooses by |pre_acts| and there is no ReLU (arXiv 2510.00404).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trainer.kernels.select import largest
from trainer.saes.base import Encoded, Gradients, Reconstruction, Sae, add

INITIAL_PRE_ACT = 1.0
"""A latent that only just is among the k begins with this value (elements of x have variance 1)."""


class TopK(Sae):
    """See the module's docstring."""

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        super().initialise(x, y, generator)
        if self.settings.initial_rates == "equal":
            self.equalise(x, self.k / self.d_sae, INITIAL_PRE_ACT)

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        weight = self.settings.multi_topk
        encoded = self.choose(x, self.revived(dead), [self.k, 4 * self.k] if weight else [self.k])
        main = self.reconstruct(encoded.latents[0], x, y)
        grads = self.through(encoded, 0, main)
        add(grads, self.output_gradients(x, main.total))
        losses = {"reconstruction": main.loss}
        if weight:
            multi = self.reconstruct(encoded.latents[1], x, y)
            add(grads, self.through(encoded, 1, multi, weight))
            add(grads, self.output_gradients(x, weight * multi.total))
            losses["multi_topk"] = weight * multi.loss
        self.auxiliary(grads, losses, encoded, y, main.y_hat)
        return Gradients(grads, losses, main.y_hat, encoded.latents[0])

    def choose(self, x: Tensor, kept: Tensor, ks: list[int]) -> Encoded:
        """One set of active latents for each k, split into segments."""
        encoded = self.encode(x, kept, *(partial(largest, k=k, magnitude=self.settings.abs) for k in ks))
        return replace(encoded, latents=[latents.split(self.ends) for latents in encoded.latents])

    def through(self, encoded: Encoded, choice: int, of: Reconstruction, weight: float = 1.0) -> dict[str, Tensor]:
        """Gradients of `weight` times a loss through the entries of a choice; one that ReLU set to zero passes none."""
        latents = encoded.latents[choice]
        dz, rows = of.dlatents * (latents.value != 0), of.rows
        if weight != 1.0:
            dz, rows = weight * dz, weight * rows
        return self.backward(encoded.read, latents, dz, rows)

    @property
    def k(self) -> int:
        assert self.settings.k is not None
        return self.settings.k

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        # The flag makes SAELens' fold_W_dec_norm work; with unit rows it changes nothing.
        architecture = "abstopk" if self.settings.abs else "topk"
        keys: dict[str, object] = {"architecture": architecture, "k": self.k}
        return keys | {"rescale_acts_by_decoder_norm": self.unit_decoder}, self.common_weights()
