"""TopK with AuxK (Gao et al. 2024, arXiv 2406.04093).

    latents = ReLU(TopK_k(pre_acts))                            y_hat = latents W_dec + b_dec
    L = |y − y_hat|² / variance + w_aux · |e_hat − e|² / |e − mean(e)|² (+ w_multi · |y − y_hat_{4k}|² / variance)

`variance` is frozen at the start, so that the loss is FVU and its scale never depends on a batch. The second term is
`auxk.add_auxk`; w_aux = 1/32. Multi-TopK decodes the same pre_acts once more with 4 k latents, w_multi = 1/8 in the
paper. With `abs`, TopK selects by |pre_acts| and there is no ReLU (arXiv 2510.00404).

A step reads from top to bottom in `FixedK.gradients`: `select` multiplies by W_enc and keeps the k largest
(`Sae.encode`), `Sae.reconstruct` multiplies them by W_dec and takes the loss, `backward_through` cuts the gradient
where latents are zero, and `Sae.backward` takes it to the parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.kernels.select import candidates, largest
from trainer.kernels.sparse import Entries
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.annealing import AnnealedSettings
from trainer.saes.architectures.auxk import add_auxk
from trainer.saes.base import Sae
from trainer.saes.encoder import Encoded
from trainer.saes.gradients import Gradients, Reconstruction, add
from trainer.saes.published import (
    ALL_LATENTS,
    Activation,
    FormatError,
    SaeWeights,
    linear_state,
    scalar_state,
)
from trainer.saes.settings import CostTerms, NestedSettings, Positive, Revival, SaeSettings

INITIAL_PRE_ACT = 1.0
"""The least of the k selected latents has about this value at the start (elements of x have variance 1)."""


class FixedKSettings(NestedSettings, AnnealedSettings):
    """Settings of an SAE with a fixed number of latents."""

    IS_TUNABLE: ClassVar[bool] = True
    SHAPE: ClassVar[frozenset[str]] = NestedSettings.SHAPE | {"k"}
    TARGET = "k"

    k: Positive | None = Field(default=None, examples=[32])
    """Latents per activation."""

    def faults(self) -> Iterator[str]:
        if self.k is None:
            yield f"architecture {self.architecture} needs k, such as k = 32"
        elif self.k > self.d_sae:
            yield f"k = {self.k} exceeds d_sae = {self.d_sae}; lower k or raise d_sae"
        yield from super().faults()

    @property
    def default_revival(self) -> Revival:
        return "auxk"

    def cost_terms(self) -> CostTerms:
        assert self.k is not None
        return CostTerms(active=float(self.k), first_active=self.first_active)

    def start_fault(self, cfg: Mapping[str, Any]) -> str | None:
        return f"set k = {cfg['k']}" if cfg.get("k", self.k) != self.k else None


class TopKSettings(FixedKSettings):
    """[[sae]] with architecture topk."""

    SHAPE: ClassVar[frozenset[str]] = FixedKSettings.SHAPE | {"abs"}

    architecture: Literal["topk"] = "topk"
    abs: bool = False
    """Select by magnitude and keep signs."""
    multi_topk: float = Field(default=0.0, ge=0.0)
    """Weight of a second loss with 4 k latents, so that the code degrades gently; the paper has 0.125."""

    @property
    def title(self) -> str:
        return "topk with abs" if self.abs else "topk"

    def faults(self) -> Iterator[str]:
        if self.k is not None and self.multi_topk and self.k <= self.d_sae < 4 * self.first_active:
            k, lower = round(self.first_active), "anneal_from" if self.anneal_tokens else "k"
            yield f"multi_topk uses 4 k = {4 * k} latents, more than d_sae = {self.d_sae}; lower {lower} or raise d_sae"
        yield from super().faults()

    def cost_terms(self) -> CostTerms:
        assert self.k is not None
        factor = 5 if self.multi_topk else 1
        k = float(factor * self.k)
        return CostTerms(
            active=k, total_k=k, losses=2 if self.multi_topk else 1, first_active=factor * self.first_active
        )


class TopKActivation(Activation):
    """ReLU of the k largest pre-activations."""

    name = "topk"
    architecture = "topk"
    unit_rows = False
    decided_by = "largest"

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        value, index = torch.topk(pre_acts, cfg["k"], dim=-1)
        return torch.zeros_like(pre_acts).scatter_(-1, index, value.relu())

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        best = torch.topk(pre_acts, min(cfg["k"] + 1, pre_acts.shape[1])).values
        return best[:, -2] - best[:, -1] if best.shape[1] > cfg["k"] else best[:, 0]

    def fault(self, cfg: Mapping[str, Any], d_sae: int) -> str | None:
        if isinstance(k := cfg.get("k"), int) and 0 < k <= d_sae:
            return None
        return f"its k is {k!r}; a number from 1 to {d_sae} is expected"

    def require_saelens(self, sae: SaeWeights) -> None:
        if sae.is_transcoder:
            raise FormatError("SAELens has no top-k transcoders")

    def as_jumprelu(self, sae: SaeWeights) -> SaeWeights:
        raise FormatError("a top-k compares latents with each other, which no threshold does")

    def to_sparsify(self, sae: SaeWeights) -> dict[str, Any]:
        return {"activation": "topk", "k": sae.cfg["k"], "multi_topk": False}

    def to_dictionary_learning(self, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        no_threshold = torch.tensor(-1.0)  # there it replaces top-k on request only
        return "AutoEncoderTopK", linear_state(sae.recentred(centred=True)) | scalar_state(sae.cfg["k"], no_threshold)


class AbsTopKActivation(TopKActivation):
    """The k pre-activations of the largest magnitude, signs kept."""

    name = "abstopk"
    architecture = "abstopk"
    by_magnitude = True

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        index = torch.topk(pre_acts.abs(), cfg["k"], dim=-1).indices
        return torch.zeros_like(pre_acts).scatter_(-1, index, pre_acts.gather(-1, index))

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return super().margins(pre_acts.abs(), weights, cfg)

    def to_sparsify(self, sae: SaeWeights) -> dict[str, Any]:
        raise FormatError("sparsify knows top-k by value only")

    def to_dictionary_learning(self, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        raise FormatError("dictionary_learning's top-k does not choose by magnitude")


TOPK, ABSTOPK = TopKActivation(), AbsTopKActivation()


class FixedK(Sae):
    """The common part of TopK and BatchTopK: losses of the k latents, and of 4 k, that `select` returns."""

    settings: FixedKSettings
    multi_topk = 0.0
    """Weight of the loss with 4 k latents."""

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        super().initialise(x, y, generator)
        if self.settings.initial_rates == "equal":
            self.equalise_rates(x, self.k / self.d_sae, INITIAL_PRE_ACT)

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        weight = self.multi_topk
        encoded = self.select(x, self.aux_latents(dead), [self.k, 4 * self.k] if weight else [self.k])
        main = self.reconstruct(encoded.latents[0], x, y)
        grads = self.backward_through(encoded, 0, main)
        add(grads, self.output_gradients(x, main.dy_hat))
        losses = {"reconstruction": main.loss}
        if weight:
            multi = self.reconstruct(encoded.latents[1], x, y, is_auxiliary=True)
            add(grads, self.backward_through(encoded, 1, multi, weight))
            add(grads, self.output_gradients(x, weight * multi.dy_hat))
            losses["multi_topk"] = weight * multi.loss
        add_auxk(self, grads, losses, encoded, y, main.y_hat)
        return Gradients(grads, losses, main.y_hat, encoded.latents[0])

    @abstractmethod
    def select(self, x: Tensor, aux_latents: Tensor, ks: list[int]) -> Encoded:
        """One set of active latents for each k, split into segments."""

    def backward_through(
        self, encoded: Encoded, selection: int, loss: Reconstruction, weight: float = 1.0
    ) -> dict[str, Tensor]:
        """Gradients of `weight` times a loss through the latents of a selection; those at zero pass none on (ReLU)."""
        latents = encoded.latents[selection]
        dz, dlevels = loss.dlatents * (latents.value != 0), loss.dlevels
        if weight != 1.0:
            dz, dlevels = weight * dz, weight * dlevels
        return self.backward(encoded.inputs, latents, dz, dlevels)

    @property
    def k(self) -> int:
        """k at this moment, which may still be annealed."""
        return round(self.settings.active_latents(self.tokens))


class TopK(FixedK):
    """See the module's docstring."""

    Settings = TopKSettings
    activations = (TOPK, ABSTOPK)
    settings: TopKSettings

    def __init__(
        self, settings: TopKSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, widths, d_out, ranks)
        self.by_magnitude = settings.abs
        self.multi_topk = settings.multi_topk

    @classmethod
    def startable(cls, settings: SaeSettings) -> frozenset[str]:
        assert isinstance(settings, TopKSettings)
        return frozenset({ABSTOPK.name if settings.abs else TOPK.name})

    def select(self, x: Tensor, aux_latents: Tensor, ks: list[int]) -> Encoded:
        if self.ranks.is_whole:
            select = partial(largest, magnitude=self.by_magnitude, dense_above=self.dense_above)
            return self.encode(x, aux_latents, *(partial(select, k=k) for k in ks))
        own = [partial(candidates, k=min(k, len(self.latents)), magnitude=self.by_magnitude) for k in ks]
        encoded = self.encode_unsplit(x, aux_latents, *own)
        latents = []
        for k, entries in zip(ks, encoded.latents, strict=True):
            assert isinstance(entries, Entries)
            largest_of_all = self.choose_largest(entries, k, entries.column + self.latents.start)
            latents.append(largest_of_all.split(self.ends))
        return replace(encoded, latents=latents)

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        # SAELens' fold_W_dec_norm needs the flag; with unit rows it changes nothing.
        architecture = ABSTOPK.architecture if self.by_magnitude else TOPK.architecture
        keys: dict[str, object] = {"architecture": architecture, "k": self.k}
        return keys | {"rescale_acts_by_decoder_norm": self.unit_decoder}, self.common_weights(latents)
