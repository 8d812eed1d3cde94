"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).

    latents = the batch · k largest of ReLU(pre_acts) in the whole batch           y_hat = latents W_dec + b_dec
    L = as TopK's

A row may use more latents than another. At inference a row must not depend on its neighbours: one threshold θ, the
value that k latents per row exceed on average, turns it into a JumpReLU. θ is estimated afresh for every snapshot, on
rows that the weights of that moment encode; running averages lag behind while weights still move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.kernels.select import Latents, largest_of_batch, topk
from trainer.saes.topk import TopK

ROWS_AT_ONCE = 2048


class BatchTopK(TopK):
    """See the module's docstring."""

    threshold = 0.0
    """For inference, in the scale of x; 0 before the first `calibrate`."""
    _smallest = 0.0

    def adopt(self, weights: dict[str, Tensor]) -> None:
        super().adopt(weights)
        if "threshold" in weights:  # one for all latents, until the first `calibrate`
            self.threshold = float(weights["threshold"][0])

    def choose(self, pre_acts: Tensor, k: int) -> Latents:
        latents, self._smallest = largest_of_batch(pre_acts, k * len(pre_acts), self._smallest)
        return latents.split(self.ends)

    def calibrate(self, x: Tensor) -> None:
        """Sets `threshold` such that k latents per row exceed it on the scaled rows x [rows, d_in]."""
        candidates = min(self.d_sae, 8 * self.k)  # a row with more than these above the threshold is not met
        best = [
            topk(self.in_float32(rows), candidates)[0].flatten() for rows in x.to(self.W_enc.device).split(ROWS_AT_ONCE)
        ]
        value = torch.cat(best).relu_()
        self.threshold = float(value.kthvalue(max(1, len(value) - self.k * len(x))).values)

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        weights = self.common_weights()
        weights["threshold"] = torch.full_like(weights["b_enc"], self.threshold)
        return {"architecture": "jumprelu"}, weights
