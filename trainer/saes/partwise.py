"""A published SAE run part by part: only some latents are in memory, and ranks that share it have parts of their own.

    margins     how far each row of x is from activating other latents
    encode      the active latents
    decode      the reconstruction, whose sum goes over the latents of all ranks

Whether a latent is active is decided by itself, or by the k largest pre-activations of its row, of all ranks together
(`Activation.decided_by`). An activation that looks at a whole row otherwise gets all latents at once, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.parallel.environment import LATENTS_PER_UNIT
from trainer.parallel.ranks import Ranks
from trainer.saes.inference import InferenceSae
from trainer.snapshot import SnapshotError

WeightsOf = Callable[[range], Mapping[str, Tensor]]
"""Weights of some latents as on disk: W_enc [d_in, n], W_dec [n, d_out], vectors [n]; and those of no single latent."""


@dataclass(frozen=True)
class ActiveLatents:
    """Latents that are not zero, in any order."""

    row: Tensor
    """[active]"""
    latent: Tensor
    """[active], among all latents"""
    value: Tensor
    """[active]"""

    def among(self, latents: range, rows: int) -> Tensor:
        """Those of some latents as a matrix [rows, n]."""
        is_among = (self.latent >= latents.start) & (self.latent < latents.stop)
        matrix = self.value.new_zeros(rows, len(latents))
        matrix[self.row[is_among], self.latent[is_among] - latents.start] = self.value[is_among]
        return matrix


class PartwiseSae:
    """See the module's docstring. All methods that end in a sum or a choice over ranks are collective."""

    def __init__(
        self, cfg: Mapping[str, Any], blocks: Sequence[range], weights_of: WeightsOf, ranks: Ranks, d_sae: int
    ) -> None:
        """`blocks` of the latents that this rank has; sums over latents are formed for each of them first."""
        self._cfg = dict(cfg)
        self._weights_of = weights_of
        self._ranks = ranks
        self._d_sae = d_sae
        self._whole = InferenceSae(self._cfg, dict(weights_of(range(0))))
        self._activation = self._whole.activation
        self._blocks = blocks
        if self._activation.decided_by == "row":
            self._blocks = [range(d_sae)]
            if not ranks.is_alone:
                raise SnapshotError(
                    f"architecture {cfg['architecture']} looks at all latents of a row: train it on one rank"
                )

    def margins(self, x: Tensor) -> Tensor:
        """The least change of a pre-activation that switches a latent, for each row of x [rows, d_in]."""
        with self._ranks.agreement():
            local = self._local_margins(x)
        if self._activation.decided_by != "largest":
            return self._ranks.gather(local, "publishing").amin(0)
        largest = self._ranks.gather(local, "publishing").transpose(0, 1).flatten(1)
        best = largest.topk(min(self._cfg["k"] + 1, self._d_sae), dim=1).values
        return self._activation.margins(best, {}, self._cfg)

    def encode(self, x: Tensor) -> ActiveLatents:
        """The active latents of x [rows, d_in], those of this rank."""
        with self._ranks.agreement():
            local = self._local_latents(x)
        if self._activation.decided_by != "largest":
            return local
        k, rows = self._cfg["k"], len(x)
        order = local.value.abs() if self._activation.by_magnitude else local.value
        candidates = order.new_full((rows, k), -torch.inf)
        candidates[:, : len(order) // rows] = order.view(rows, -1)
        everyone = self._ranks.gather(candidates, "publishing").transpose(0, 1).flatten(1)
        least = everyone.topk(k, dim=1).values[:, -1]
        chosen = order >= least[local.row]
        value = local.value if self._activation.by_magnitude else local.value.relu()
        return ActiveLatents(local.row[chosen], local.latent[chosen], value[chosen])

    def decode(self, latents: ActiveLatents, x: Tensor) -> Tensor:
        """The reconstruction [rows, d_out] in float64 from the active latents of all ranks."""
        with self._ranks.agreement():
            sums = torch.zeros(len(self._blocks), len(x), len(self._whole.b_dec), dtype=torch.float64)
            for sum_, block in zip(sums, self._blocks, strict=True):
                for part in self._parts(block):
                    W_dec = self._weights_of(part)["W_dec"]
                    sum_ += latents.among(part, len(x)).to(W_dec.dtype) @ W_dec
        y_hat = self._ranks.total(sums, "publishing") + self._whole.b_dec
        W_skip = self._whole.W_skip
        return y_hat if W_skip is None else y_hat + x.to(W_skip.dtype) @ W_skip.T

    def decoder_norms(self) -> Tensor:
        """Norms of the decoder rows of this rank's latents."""
        parts = (part for block in self._blocks for part in self._parts(block))
        return torch.cat([self._weights_of(part)["W_dec"].norm(dim=1) for part in parts])

    def _parts(self, block: range) -> Iterator[range]:
        size = LATENTS_PER_UNIT if self._activation.decided_by != "row" else max(1, len(block))
        return (block[first : first + size] for first in range(0, len(block), size))

    def _pre_acts(self, x: Tensor) -> Iterator[tuple[range, InferenceSae, Tensor]]:
        """Each part of the latents, the SAE that it is, and its pre-activations [rows, n]."""
        for block in self._blocks:
            for part in self._parts(block):
                sae = InferenceSae(self._cfg, dict(self._weights_of(part)))
                yield part, sae, sae.pre_acts(x)

    def _local_margins(self, x: Tensor) -> Tensor:
        """[rows] of this rank's latents; where the largest decide, this rank's k + 1 largest [rows, k + 1]."""
        if self._activation.decided_by == "largest":
            largest = x.new_full((len(x), self._cfg["k"] + 1), -torch.inf)
            for _, _, pre_acts in self._pre_acts(x):
                values = pre_acts.abs() if self._activation.by_magnitude else pre_acts
                largest = torch.cat([largest, values], 1).topk(largest.shape[1], dim=1).values
            return largest
        least = x.new_full((len(x),), torch.inf)
        for _, sae, pre_acts in self._pre_acts(x):
            least = torch.minimum(least, self._activation.margins(pre_acts, sae.weights, self._cfg))
        return least

    def _local_latents(self, x: Tensor) -> ActiveLatents:
        """This rank's active latents; where the largest decide, its k largest of each row, row by row, signs kept."""
        rows = torch.arange(len(x))
        if self._activation.decided_by == "largest":
            value, latent = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64)
            for part, _, pre_acts in self._pre_acts(x):
                value = torch.cat([value, pre_acts], 1)
                latent = torch.cat([latent, torch.tensor(part).expand(len(x), -1)], 1)
                order = value.abs() if self._activation.by_magnitude else value
                best = order.topk(min(self._cfg["k"], value.shape[1]), dim=1).indices
                value, latent = value.gather(1, best), latent.gather(1, best)
            return ActiveLatents(rows.repeat_interleave(value.shape[1]), latent.flatten(), value.flatten())
        nothing = torch.empty(0, dtype=torch.int64)
        active: list[tuple[Tensor, Tensor, Tensor]] = [(nothing, nothing, x.new_empty(0))]
        for part, sae, pre_acts in self._pre_acts(x):
            latents = self._activation.encode(pre_acts, sae.weights, self._cfg)
            row, column = latents.nonzero(as_tuple=True)
            active.append((row, column + part.start, latents[row, column]))
        row, latent, value = (torch.cat(each) for each in zip(*active, strict=True))
        return ActiveLatents(row, latent, value)
