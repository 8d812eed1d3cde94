"""TopK with AuxK (Gao et al. 2024, arXiv 2406.04093).

    latents = ReLU(TopK_k(pre_acts))                            x_hat = latents W_dec + b_dec
    L = |x − x_hat|² / variance + w_aux · |e_hat − e|² / |e − mean(e)|²

    e = x − x_hat, held constant;  e_hat = ReLU(TopK_{k_aux}(pre_acts of dead latents)) W_dec, without b_dec

`variance` is frozen at the start, so that the loss is FVU and its scale never depends on a batch. The auxiliary loss
lets dead latents explain what the living ones leave over; ReLU there as in the main path. w_aux = 1/32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.sparse import Entries, sample, topk, topk_entries, transpose, widen
from trainer.saes.base import Gradients, Sae


class TopK(Sae):
    """See the module's docstring."""

    def gradients(self, x: Tensor, dead: Tensor) -> Gradients:
        W_dec = self.parameters["W_dec"]
        pre_acts = self.pre_acts(x)
        latents = topk_entries(pre_acts, self._k)
        x_hat = self.decode(latents)
        error = x - x_hat
        dx_hat = error * (-2.0 / (len(x) * self.variance))
        losses = {"reconstruction": error.square().sum() / (len(x) * self.variance)}
        db_dec = dx_hat.sum(0)

        dz = sample(latents, dx_hat, W_dec).mul_(latents.value > 0)
        rows, entries = dx_hat, latents
        if (revived := self._auxiliary(pre_acts, error, dead)) is not None:
            aux_latents, de_hat, losses["auxiliary"] = revived
            aux_dz = sample(aux_latents, de_hat, W_dec).mul_(aux_latents.value > 0)
            # Rows of x_hat and of e_hat in one list: each latent's gradient is then one sum over its entries.
            rows, entries, dz = torch.cat([dx_hat, de_hat]), _stack(latents, aux_latents), torch.cat([dz, aux_dz])
            x = torch.cat([x, x])
        by_latent = transpose(entries)
        grads = self.encoder_gradients(by_latent, dz, x)
        grads["W_dec"] = by_latent.multiply(entries.value, rows)
        grads["b_dec"] += db_dec
        return Gradients(grads, losses, x_hat, latents)

    def _auxiliary(self, pre_acts: Tensor, error: Tensor, dead: Tensor) -> tuple[Entries, Tensor, Tensor] | None:
        """(latents of dead rows, ∂L/∂e_hat, loss), or None when nothing is dead or nothing is left to explain."""
        weight, indices = self.settings.aux_weight, dead.nonzero().squeeze(1)
        k_aux = min(self._k_aux, len(indices))
        if not k_aux or not weight:
            return None
        value, place = topk(pre_acts[:, indices], k_aux)
        start = torch.arange(0, len(error) * k_aux + 1, k_aux, device=error.device)
        latents = Entries(start, indices[place].reshape(-1), widen(value).relu().reshape(-1), self.d_sae)
        spread = (error - error.mean(0)).square().sum()
        if not spread > 0:
            return None
        difference = self.decode(latents) - self.parameters["b_dec"] - error
        return latents, difference * (2.0 * weight / spread), weight * difference.square().sum() / spread

    @property
    def _k(self) -> int:
        assert self.settings.k is not None
        return self.settings.k

    @property
    def _k_aux(self) -> int:
        return self.settings.k_aux or max(1, self.d_in // 2)

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        # The flag makes SAELens' fold_W_dec_norm work; with unit rows it changes nothing.
        return {"architecture": "topk", "k": self._k, "rescale_acts_by_decoder_norm": True}, {}


def _stack(first: Entries, second: Entries) -> Entries:
    """The rows of `second` below those of `first`."""
    return Entries(
        torch.cat([first.start, second.start[1:] + first.start[-1]]),
        torch.cat([first.column, second.column]),
        torch.cat([first.value, second.value]),
        first.columns,
    )
