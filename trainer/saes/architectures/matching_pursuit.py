"""Matching pursuit (Costa et al. 2025, arXiv 2506.03093): each latent is chosen for what those before it left over.

    r_0 = x − b_dec        i_t = argmax_i r_{t−1} · W_dec,i        v_t = ReLU(r_{t−1} · W_dec,i_t)
                           r_t = r_{t−1} − v_t W_dec,i_t           t = 1 … k
    latents_i = Σ v_t over the t with i_t = i                      y_hat = latents W_dec + b_dec = x − r_k
    L = |r_k|² / variance

There is no encoder beside the decoder, whose rows have unit norm. A latent that only matters once another is taken
away, such as a child of it in a hierarchy, is found, which one product with an encoder does not do; k of them cost k
times as much. The gradient goes through all choices: with g_k = ∂L/∂r_k and d = W_dec,i_t

    ∂L/∂v_t = −g_t · d where v_t > 0               ∂L/∂d += −v_t g_t + ∂L/∂v_t r_{t−1}
    g_{t−1} = g_t + ∂L/∂v_t d                      ∂L/∂b_dec = −Σ g_0

Residuals before a choice are found again from those after it. Ranks would have to agree on each of the k choices: one
rank holds all latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.kernels.select import joined, positive
from trainer.kernels.sparse import Entries
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.base import Sae
from trainer.saes.gradients import Gradients
from trainer.saes.initial import normalise_rows
from trainer.saes.published import ALL_LATENTS, Activation
from trainer.saes.settings import CostTerms, Positive, SaeSettings

CHUNK_BYTES = 2**27
"""Size of the gradients of all choices of a chunk of rows."""
LEAST_ROWS = 64


class MatchingPursuitSettings(SaeSettings):
    """[[sae]] with architecture matching_pursuit."""

    SHAPE: ClassVar[frozenset[str]] = SaeSettings.SHAPE | {"k"}
    REVIVALS: ClassVar[frozenset[str]] = frozenset({"none"})
    HAS_TRANSCODER: ClassVar[bool] = False
    IS_SHARDED: ClassVar[bool] = False

    architecture: Literal["matching_pursuit"] = "matching_pursuit"
    k: Positive = Field(examples=[32])
    """Choices for each activation; a latent may be chosen more than once."""

    def faults(self) -> Iterator[str]:
        if self.hooks is not None or self.whitening:
            key = "whitening" if self.whitening else "hooks"
            yield f"{key} would make encoder and decoder of a published SAE differ, which matching_pursuit has not: "
            "remove it"
        yield from super().faults()

    def cost_terms(self) -> CostTerms:
        return CostTerms(active=float(self.k), encodings=self.k, latent_parameters=1, tied=True)

    def start_fault(self, cfg: Mapping[str, Any]) -> str | None:
        return f"set k = {cfg['max_iterations']}" if cfg["max_iterations"] != self.k else None


class MatchingPursuitActivation(Activation):
    """What matching pursuit takes; pre-activations are the products of all directions with r_0."""

    name = "matching_pursuit"
    architecture = "matching_pursuit"
    has_transcoder = False
    is_tied = True
    vectors = ()
    unit_rows = False

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        latents = torch.zeros_like(pre_acts)
        for value, index, _ in _choices(pre_acts, weights["W_dec"], cfg["max_iterations"]):
            latents.scatter_add_(-1, index, value)
        return latents

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        """The least lead of a choice over the next best, or over zero."""
        leads = [lead for _, _, lead in _choices(pre_acts, weights["W_dec"], cfg["max_iterations"])]
        return torch.stack(leads).amin(0)

    def fault(self, cfg: Mapping[str, Any], d_sae: int) -> str | None:
        if not isinstance(k := cfg.get("max_iterations"), int) or k < 1:
            return f"its max_iterations is {k!r}; a whole number is expected"
        if cfg.get("residual_threshold") or cfg.get("stop_on_duplicate_support", True):
            return (
                "it stops before max_iterations (residual_threshold or stop_on_duplicate_support), which is not known"
            )
        return None


def _choices(pre_acts: Tensor, W_dec: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(value [..., 1], index [..., 1], lead [...]) of each choice; pre_acts [..., d_sae] of r_0 stay as they are."""
    for _ in range(k):
        best, order = pre_acts.topk(min(2, pre_acts.shape[-1]), dim=-1)
        index, value = order[..., :1], best[..., :1].relu()
        yield value, index, (best[..., 0] - best[..., -1].relu()).abs()
        pre_acts = pre_acts - value * (W_dec[index[..., 0]] @ W_dec.T)


MATCHING_PURSUIT = MatchingPursuitActivation()


class MatchingPursuit(Sae):
    """The one matrix is the parameter `W_dec`."""

    Settings = MatchingPursuitSettings
    activations = (MATCHING_PURSUIT,)
    settings: MatchingPursuitSettings

    def __init__(
        self, settings: MatchingPursuitSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, widths, d_out, ranks)
        del self.parameters["W_enc"], self.parameters["b_enc"]

    @property
    def W_enc(self) -> Tensor:
        return self.W_dec

    @property
    def b_enc(self) -> Tensor:
        """Zeros; what is written there is lost."""
        return self.W_dec.new_zeros(len(self.W_dec))

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        rows = max(LEAST_ROWS, CHUNK_BYTES // (self.settings.k * self.d_in * x.element_size()))
        weight = 1.0 / (len(x) * self.variance)
        chunks = [self._chunk(part, weight) for part in (x - self.b_dec).split(rows)]
        dW_dec, db_dec, residuals, latents = zip(*chunks, strict=True)
        residual = torch.cat(residuals)
        of = {"W_dec": sum(dW_dec[1:], dW_dec[0]), "b_dec": sum(db_dec[1:], db_dec[0])}
        fired = joined([positive(part, dense_above=self.dense_above) for part in latents])
        return Gradients(of, {"reconstruction": weight * residual.square().sum()}, x - residual, fired)

    def _chunk(self, residual: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(∂L/∂W_dec, ∂L/∂b_dec, r_k, latents [rows, d_sae]) of some rows, from their r_0."""
        W_dec, operand, latents = self.W_dec, self.operand("W_dec"), residual.new_zeros(len(residual), self.d_sae)
        indices, values = [], []
        for _ in range(self.settings.k):
            index = (residual.to(operand.dtype) @ operand.T).argmax(1)
            directions = W_dec[index]
            value = (residual * directions).sum(1, keepdim=True).relu()
            residual = residual - value * directions
            latents.scatter_add_(1, index[:, None], value)
            indices.append(index)
            values.append(value)
        r, g, of_choices = residual, 2 * weight * residual, []
        for index, value in zip(reversed(indices), reversed(values), strict=True):
            directions = W_dec[index]
            r = r + value * directions
            dvalue = -(g * directions).sum(1, keepdim=True) * (value > 0)
            of_choices.append(dvalue * r - value * g)
            g = g + dvalue * directions
        column = torch.cat(indices[::-1])
        ones = residual.new_ones(len(column))
        entries = Entries(torch.arange(len(column) + 1, device=column.device), column, ones, self.d_sae)
        return entries.transpose().multiply(ones, torch.cat(of_choices)), -g.sum(0), residual, latents

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        W_dec = self.W_dec[latents].clone()
        normalise_rows(W_dec)
        keys: dict[str, object] = {"architecture": MATCHING_PURSUIT.architecture, "max_iterations": self.settings.k}
        keys |= {"residual_threshold": 0.0, "stop_on_duplicate_support": False}
        return keys, {"W_dec": W_dec, "W_enc": W_dec.clone(), "b_dec": self.b_dec.clone()}
