"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).

    latents = the batch · k largest of ReLU(pre_acts) in the whole batch           y_hat = latents W_dec + b_dec
    L = as TopK's

One activation may have more latents than another. At inference it must not depend on the others of its batch: one
threshold θ, which k latents per activation exceed on average, turns the SAE into a JumpReLU. θ is estimated for every
snapshot, from activations that the present weights encode; a running average would lag behind while weights change.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trainer.kernels.select import dense_if_many, exceeding, largest_of, nth_smallest, topk
from trainer.kernels.sparse import Entries
from trainer.parallel import selection
from trainer.saes.architectures.jumprelu import JUMPRELU
from trainer.saes.architectures.topk import TOPK, FixedK, FixedKSettings
from trainer.saes.base import OfAllLatents
from trainer.saes.encoder import Encoded
from trainer.saes.folding import grow
from trainer.saes.published import ALL_LATENTS, SaeWeights, linear_state, matrix_state, scalar_state
from trainer.saes.settings import CostTerms, SaeSettings
from trainer.snapshot import SnapshotError

ROWS_AT_ONCE = 2048
"""Rows that `calibrate` encodes at a time."""
ESTIMATE_ROWS = 64
"""Rows from which the least value of the first batch is estimated."""
FLOOR_SHARE = 0.8
"""Candidates exceed this share of the least value that the last batch selected."""
CALIBRATION_FACTOR = 8
"""`calibrate` looks at this many times k latents of each row."""
THRESHOLD_TOLERANCE = 0.01
"""Relative difference up to which thresholds of latents count as one: input scales come from another sample."""
ROUNDING = 1e-6
"""The same within a snapshot, whose decoder norms were divided out of the thresholds."""


class BatchTopKSettings(FixedKSettings):
    """[[sae]] with architecture batchtopk."""

    architecture: Literal["batchtopk"] = "batchtopk"

    def cost_terms(self) -> CostTerms:
        return replace(super().cost_terms(), batch_selections=1, scalars=1)


def _live(weights: dict[str, Tensor]) -> Tensor:
    """bool [latents]: those whose encoder row is not zero."""
    return weights["W_enc"].any(1)


class BatchTopK(FixedK):
    """See the module's docstring."""

    Settings = BatchTopKSettings
    activations = (JUMPRELU,)
    settings: BatchTopKSettings

    threshold = 0.0
    """θ in the scale of x; 0 before the first `calibrate`."""
    _least = 0.0
    """The least value selected in the last batch: it decides the number of candidates, never the result."""

    @classmethod
    def startable(cls, settings: SaeSettings) -> frozenset[str]:
        return frozenset({TOPK.name, JUMPRELU.name})

    def adapt(self, weights: dict[str, Tensor], of_all: OfAllLatents) -> dict[str, Tensor]:
        """Weights with one threshold: the thresholds are equal up to rounding, or free decoder norms make them so."""
        if "threshold" not in weights or not (live_anywhere := of_all(_live)).any():
            return weights
        thresholds = of_all(lambda some: some["threshold"])[live_anywhere]
        mean = thresholds.mean()
        if not self.unit_decoder and (thresholds > 0).all():
            weights = grow(weights, (mean / weights["threshold"]).where(_live(weights), mean.new_ones(())))
        elif ((thresholds - mean).abs() > THRESHOLD_TOLERANCE * mean).any():
            raise SnapshotError("its latents have thresholds of their own: go on from it with architecture jumprelu")
        return weights | {"threshold": mean.expand(len(weights["threshold"]))}

    def adopt(self, weights: dict[str, Tensor]) -> None:
        super().adopt(weights)
        if "threshold" in weights:  # equal for all latents; it holds until the first `calibrate`
            self.threshold = float(weights["threshold"][0])

    def select(self, x: Tensor, aux_latents: Tensor, ks: list[int]) -> Encoded:
        """The k · batch largest, among candidates above most of what the last batch left out; of all, if too few."""
        floor = FLOOR_SHARE * (self._least or self._estimate(x, max(ks)))
        encoded, candidates = self._candidates(x, aux_latents, floor)
        if self.ranks.count(len(candidates.value)) < max(ks) * len(x):
            encoded, candidates = self._candidates(x, aux_latents, 0.0)
        selections = [self._largest_of(candidates, k * len(x)) for k in ks]
        latents = [dense_if_many(entries, self.dense_above).split(self.ends) for entries in selections]
        return replace(encoded, latents=latents)

    def _largest_of(self, candidates: Entries, count: int) -> Entries:
        """This rank's entries of the `count` largest of all ranks; remembers the least of them all."""
        if self.ranks.is_whole:
            entries = largest_of(candidates, count)
            self._least = float(entries.value.min()) if len(entries.value) else 0.0
            return entries
        entries, least = selection.largest_of(self.ranks, candidates, count, self.latents.start)
        self._least = least if math.isfinite(least) else 0.0
        return entries

    def _candidates(self, x: Tensor, aux_latents: Tensor, floor: float) -> tuple[Encoded, Entries]:
        encoded = self.encode_unsplit(x, aux_latents, partial(exceeding, floor=max(0.0, floor)))
        (candidates,) = encoded.latents
        assert isinstance(candidates, Entries)
        return encoded, candidates

    def _estimate(self, x: Tensor, k: int) -> float:
        """The least value that a batch will select, roughly, from a few of its rows; the same on all ranks."""
        pre_acts = self.pre_acts(x[:ESTIMATE_ROWS]).flatten()
        count = k * len(x[:ESTIMATE_ROWS])
        if not self.ranks.is_whole:
            return selection.nth_largest(self.ranks, pre_acts, count)
        return float(nth_smallest(pre_acts, max(1, len(pre_acts) - count)))

    def calibrate(self, x: Tensor) -> None:
        """Sets `threshold` such that k latents per row exceed it on scaled activations x [rows, d_in]."""
        candidates = min(len(self.latents), CALIBRATION_FACTOR * self.k)  # no row has more above it in practice
        blocks = x.to(self.W_enc.device).split(ROWS_AT_ONCE)
        value = torch.cat([topk(self.pre_acts(block), candidates)[0].flatten() for block in blocks]).relu_()
        if self.ranks.is_whole:
            self.threshold = float(nth_smallest(value, max(1, len(value) - self.k * len(x))))
        else:
            self.threshold = selection.nth_largest(self.ranks, value, self.k * len(x) + 1)

    @classmethod
    def to_dictionary_learning(cls, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        centred, settings = sae.recentred(centred=True), sae.metadata["settings"]
        thresholds = centred["threshold"]
        mean = thresholds.mean()
        if ((thresholds - mean).abs() > ROUNDING * mean).any():
            return super().to_dictionary_learning(sae)
        scalars = scalar_state(settings["k"], mean)
        if ends := settings.get("matryoshka"):
            sizes = torch.tensor([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
            return "MatryoshkaBatchTopKSAE", matrix_state(centred) | scalars | {"group_sizes": sizes}
        return "BatchTopKSAE", linear_state(centred) | scalars

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        weights = self.common_weights(latents)
        weights["threshold"] = torch.full_like(weights["b_enc"], self.threshold)
        return {"architecture": JUMPRELU.architecture}, weights
