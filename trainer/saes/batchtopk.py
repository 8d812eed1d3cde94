"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).

    latents = the batch · k largest of ReLU(pre_acts) in the whole batch           y_hat = latents W_dec + b_dec
    L = as TopK's

A row may use more latents than another. At inference a row must not depend on its neighbours: one threshold θ, the
value that k latents per row exceed on average, turns it into a JumpReLU. θ is estimated afresh for every snapshot, on
rows that the weights of that moment encode; running averages lag behind while weights still move.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trainer.kernels.select import dense_if_many, exceeding, largest_of, topk
from trainer.kernels.sparse import Entries
from trainer.saes.base import Encoded
from trainer.saes.folding import grow
from trainer.saes.jumprelu import JUMPRELU
from trainer.saes.published import SaeWeights, linear_state, matrix_state, scalar_state
from trainer.saes.settings import SaeSettings
from trainer.saes.topk import TOPK, FixedK, FixedKSettings
from trainer.snapshot import SnapshotError

ROWS_AT_ONCE = 2048
ROWS_AT_FIRST = 64
ONE_THRESHOLD = 0.01
"""How far the thresholds of latents may be apart to count as one: input scales of another sample."""
ROUNDING = 1e-6
"""How far they may be apart in a snapshot: decoder norms were divided out of them."""


class BatchTopKSettings(FixedKSettings):
    """[[sae]] with architecture batchtopk."""

    architecture: Literal["batchtopk"] = "batchtopk"


class BatchTopK(FixedK):
    """See the module's docstring."""

    Settings = BatchTopKSettings
    activations = (JUMPRELU,)
    settings: BatchTopKSettings

    threshold = 0.0
    """For inference, in the scale of x; 0 before the first `calibrate`."""
    _smallest = 0.0
    """The smallest value chosen last: it decides how many candidates are looked at, never what is chosen."""

    @classmethod
    def startable(cls, settings: SaeSettings) -> frozenset[str]:
        return frozenset({TOPK.name, JUMPRELU.name})

    def adapt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Equal thresholds: they are so up to rounding, or free decoder norms allow to make them so."""
        reads = weights["W_enc"].abs().amax(1) > 0
        if "threshold" not in weights or not reads.any():
            return weights
        threshold = weights["threshold"]
        one = threshold[reads].mean()
        if not self.unit_decoder and (threshold[reads] > 0).all():
            weights = grow(weights, (one / threshold).where(reads, one.new_ones(())))
        elif ((threshold[reads] - one).abs() > ONE_THRESHOLD * one).any():
            raise SnapshotError("its latents have thresholds of their own: go on from it with architecture jumprelu")
        return weights | {"threshold": one.expand(len(threshold))}

    def adopt(self, weights: dict[str, Tensor]) -> None:
        super().adopt(weights)
        if "threshold" in weights:  # one for all latents, until the first `calibrate`
            self.threshold = float(weights["threshold"][0])

    def choose(self, x: Tensor, kept: Tensor, ks: list[int]) -> Encoded:
        """Most of what is below the smallest value of the last batch is not looked at twice."""
        wanted = max(ks) * len(x)
        encoded, candidates = self._candidates(x, kept, 0.8 * (self._smallest or self._estimate(x, max(ks))))
        if len(candidates.value) < wanted:
            encoded, candidates = self._candidates(x, kept, 0.0)
        chosen = [largest_of(candidates, k * len(x)) for k in ks]
        self._smallest = float(chosen[-1].value.min()) if len(chosen[-1].value) else 0.0
        latents = [dense_if_many(entries, self.dense_above).split(self.ends) for entries in chosen]
        return replace(encoded, latents=latents)

    def _candidates(self, x: Tensor, kept: Tensor, floor: float) -> tuple[Encoded, Entries]:
        encoded = self.encode(x, kept, partial(exceeding, floor=max(0.0, floor)))
        (candidates,) = encoded.latents
        assert isinstance(candidates, Entries)
        return encoded, candidates

    def _estimate(self, x: Tensor, k: int) -> float:
        """About what the smallest value of a batch will be, from a few rows."""
        some = self.in_float32(x[:ROWS_AT_FIRST]).flatten()
        return float(some.kthvalue(max(1, len(some) - k * len(x[:ROWS_AT_FIRST]))).values)

    def calibrate(self, x: Tensor) -> None:
        """Sets `threshold` such that k latents per row exceed it on the scaled rows x [rows, d_in]."""
        candidates = min(self.d_sae, 8 * self.k)  # a row with more than these above the threshold is not met
        best = [
            topk(self.in_float32(rows), candidates)[0].flatten() for rows in x.to(self.W_enc.device).split(ROWS_AT_ONCE)
        ]
        value = torch.cat(best).relu_()
        self.threshold = float(value.kthvalue(max(1, len(value) - self.k * len(x))).values)

    @classmethod
    def to_dictionary_learning(cls, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        centred, settings = sae.recentred(centred=True), sae.metadata["settings"]
        threshold = centred["threshold"]
        one = threshold.mean()
        if ((threshold - one).abs() > ROUNDING * one).any():
            return super().to_dictionary_learning(sae)
        scalars = scalar_state(settings["k"], one)
        if ends := settings.get("matryoshka"):
            sizes = torch.tensor([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
            return "MatryoshkaBatchTopKSAE", matrix_state(centred) | scalars | {"group_sizes": sizes}
        return "BatchTopKSAE", linear_state(centred) | scalars

    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        weights = self.common_weights()
        weights["threshold"] = torch.full_like(weights["b_enc"], self.threshold)
        return {"architecture": JUMPRELU.architecture}, weights
