"""What all sparse autoencoders share: parameters, products, gradients of a batch, and the form for inference.

In training both matrices have one row per latent, contiguous, so that everything after the encoder touches rows only:
W_enc [d_sae, d_in], W_dec [d_sae, d_out]. Activations are scaled to a variance of 1 per element; a published SAE takes
raw ones.

    pre_acts = (x − b_dec) W_encᵀ + b_enc        latents = act(pre_acts)        y_hat = latents W_dec + b_dec

An autoencoder reconstructs y = x. A crosscoder does too, and its x is the activations of several hooks side by side. A
transcoder reconstructs the y of another hook: b_dec is then not subtracted from x, W_dec begins at zero with free
norms, and with `skip` x W_skipᵀ is added to y_hat (arXiv 2406.11944, 2501.18823).

Matryoshka prefixes m_1 < … < m_G = d_sae (arXiv 2503.17547) replace the reconstruction loss by a mean over levels,

    L = 1/G Σ_g |y − y_hat_{≤ g}|² / variance        y_hat_{≤ g} = b_dec + Σ_{i < m_g} latents_i W_dec,i

so that a latent of segment g receives the sum of the gradients of levels ≥ g. One level is the ordinary loss.

Gradients are written out by hand, as sparse products (Gao et al. 2024, arXiv 2406.04093, appendix D), and are tested
against dense autograd.

Several ranks may share an SAE. Each holds the rows of some latents in every per-latent parameter, and all of b_dec and
W_skip; every rank sees the whole batch. What is summed over latents is summed over ranks: the products latents W_dec,
so that y_hat, the loss and its gradient by y_hat are known to all of them, with the same bits; and b_dec's gradient
through the encoder, −Σ_i db_enc,i W_enc,i. Its gradient as a term of y_hat is the same on all ranks, and counts once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from trainer.kernels.operands import Operands
from trainer.kernels.select import DENSE_ABOVE, Latents, dense_if_many
from trainer.kernels.sparse import Entries, kernels
from trainer.parallel import products, selection
from trainer.parallel.blocks import blocks_of_subset
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.encoder import BlockwiseEncoder, Encoded
from trainer.saes.gradients import THROUGH_ENCODER, Gradients, OutputLoss, Reconstruction
from trainer.saes.parameters import SaeParameters
from trainer.saes.published import ALL_LATENTS, Activation, SaeWeights
from trainer.saes.settings import SaeSettings

NO_GRADIENTS: Mapping[str, Tensor] = {}
OfAllLatents = Callable[[Callable[[dict[str, Tensor]], Tensor]], Tensor]
"""Returns a number of each latent, [d_sae], from a function of the weights of some latents."""


class Sae(SaeParameters, ABC):
    """One SAE in training.

    A subclass is an architecture: it names its settings, and the activations that its snapshots are published with.
    """

    Settings: ClassVar[type[SaeSettings]]
    """[[sae]] of this architecture."""
    activations: ClassVar[tuple[Activation, ...]]
    """Activations of its snapshots; training may start from SAEs published with them (`startable`)."""

    tokens = 0
    """Tokens that it has trained on, which annealed numbers depend on."""
    matmul_dtype: torch.dtype = torch.float32
    dense_above = DENSE_ABOVE
    """Fraction of active latents above which a full matrix holds them: a matter of speed alone."""
    trainable: frozenset[str] | None = None
    """Names of the parameters that the optimizer changes; None for all."""
    output_loss: OutputLoss | None = None
    """What replaces the squared error of y_hat, such as a loss of what a language model makes of it. For one level and
    without `skip`."""

    def __init__(
        self, settings: SaeSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        """`widths` of the hooks it reads; `d_out` is the width of a transcoder's target, None for all others.

        `ranks` share its latents.
        """
        super().__init__(settings, widths, d_out, ranks)
        if ranks.blocks > 1:
            self.dense_above = math.inf  # the bits of a dense product would depend on how many latents a rank holds
        self.operands = Operands()
        self._encoder = BlockwiseEncoder()
        self._spare_gradients: dict[str, Tensor] = {}

    @classmethod
    def startable(cls, settings: SaeSettings) -> frozenset[str]:
        """Names of the activations of published SAEs that training may start from."""
        return frozenset(activation.name for activation in cls.activations)

    def adapt(self, weights: dict[str, Tensor], of_all: OfAllLatents) -> dict[str, Tensor]:
        """Published weights, scaled as this SAE's, in a form that it can hold. Raises SnapshotError without one.

        `weights` are of some latents; what all latents decide together comes from `of_all`.
        """
        return weights

    # Training

    @abstractmethod
    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        """The loss of a batch and its gradient. Collective; `sum_shared` adds what ranks still have apart.

        x [batch, d_in], y [batch, d_out] scaled; dead [latents of this rank]: those to revive; `sparsity`: share of the
        penalty.
        """

    def sum_shared(self, grads: dict[str, Tensor]) -> None:
        """Adds b_dec's gradient through the encoder of all ranks, once. Collective."""
        if (parts := grads.pop(THROUGH_ENCODER, None)) is not None:
            grads["b_dec"] += self.ranks.total(parts, "sums")

    @property
    def partial_losses(self) -> tuple[str, ...]:
        """Names of the losses that are sums over latents: each rank has the part of its own."""
        return ()

    def after_step(self) -> None:
        """Restores constraints on parameters after an optimizer step; it keeps unit decoder rows itself."""
        return

    def encode(
        self, x: Tensor, aux_latents: Tensor, *selections: Callable[[Tensor], Latents], offset: Tensor | float = 0.0
    ) -> Encoded:
        """The one dense product of a step; `selections` are applied to pre_acts − `offset`, [rows, n] of this rank.

        They are split into segments. Pre_acts of `aux_latents`, indices [n], are kept.
        """
        encoded = self.encode_unsplit(x, aux_latents, *selections, offset=offset)
        return replace(encoded, latents=[latents.split(self.ends) for latents in encoded.latents])

    def encode_unsplit(
        self, x: Tensor, aux_latents: Tensor, *selections: Callable[[Tensor], Latents], offset: Tensor | float = 0.0
    ) -> Encoded:
        """As `encode`, for latents of which ranks choose before they are split."""
        if self.centred:  # before rounding: in bfloat16 the subtraction would cost the digits that matter
            inputs = kernels(x.device).centred(x, self.b_dec, self.matmul_dtype)
        else:
            inputs = x.to(self.matmul_dtype)
        bias = (self.b_enc - offset).to(self.matmul_dtype)
        parts = [block.latents for block in self.blocks]
        row_latents = self.d_sae if self.ranks.blocks > 1 else None  # as many rows for any number of ranks
        return self._encoder(inputs, self.operand("W_enc"), bias, selections, aux_latents, parts, row_latents)

    def padded(self, encoded: Encoded, fill: float) -> tuple[Tensor, Tensor]:
        """`Encoded.padded` where products are dense; not where blocks of latents have sparse ones of their own."""
        return encoded.padded(fill) if self.ranks.blocks == 1 else (encoded.aux_latents, encoded.aux_pre_acts)

    def choose_largest(self, candidates: Entries, k: int, latent: Tensor) -> Latents:
        """The k largest latents of each row, of those of all ranks, with ReLU unless signs are kept. Collective.

        `candidates` are the k largest that this rank has; `latent` [entries] numbers them among all latents.
        """
        largest = selection.largest(self.ranks, candidates, k, latent, self.by_magnitude)
        if not self.by_magnitude:
            largest = largest.with_value(largest.value.relu())
        return dense_if_many(largest, self.dense_above)

    def aux_latents(self, dead: Tensor) -> Tensor:
        """Indices [n] of the latents in an auxiliary loss that revives them; dead [d_sae] bool."""
        return dead.nonzero().squeeze(1) if self.settings.revival == "auxk" else dead.new_empty(0, dtype=torch.int64)

    def pre_acts(self, x: Tensor, latents: Tensor | slice = slice(None)) -> Tensor:
        """pre_acts [batch, n] in float32, as in inference; `latents` are indices [n] among those of this rank."""
        inputs, W_enc, b_enc = self.encoder_input(x), self.W_enc[latents], self.b_enc[latents]
        blocks = self.blocks if isinstance(latents, slice) else blocks_of_subset(self.blocks, latents)
        parts = [linear(inputs, W_enc[block.latents], b_enc[block.latents]) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def operand(self, name: str) -> Tensor:
        """A weight matrix in the type of products."""
        return self.operands.of(getattr(self, name), self.matmul_dtype)

    def recycle(self, gradients: dict[str, Tensor]) -> None:
        """Gives the next step the memory of these gradients: to allocate it anew takes longer than to fill it."""
        self._spare_gradients = {name: gradients[name] for name in ("W_enc", "W_dec") if name in gradients}

    def reconstruct(self, latents: Latents, x: Tensor, y: Tensor, is_auxiliary: bool = False) -> Reconstruction:
        """y_hat and its loss; `latents` are split at `ends`, and those up to the end of each level must reconstruct y.

        The loss is the squared error, or `output_loss` unless this reconstruction `is_auxiliary`. Collective.
        """
        output_loss = None if is_auxiliary else self.output_loss
        W_dec, skipped = self.operand("W_dec"), x @ self.parameters["W_skip"].T if self.settings.skip else None
        y = y if skipped is None else y - skipped
        levels = len(self.settings.levels)
        weight = 1.0 / (levels * len(y) * self.variance)
        if levels == 1 and self.ranks.is_whole and output_loss is None:
            y_hat, g, square, sampled = latents.decode(W_dec, self.b_dec, y, weight)
            result = Reconstruction(y_hat, weight * square.sum(), g, g, sampled)
        else:
            y_hats = products.multiply(self.ranks, latents, W_dec, self.blocks, len(y), levels)
            y_hats = (y_hats.cumsum(0) if levels > 1 else y_hats) + self.b_dec
            errors = y_hats - y
            loss, g = weight * errors.square().sum(), 2 * weight * errors
            if output_loss is not None:
                loss, dy_hat = output_loss(y_hats[-1], loss, g[-1])
                g = dy_hat[None]
            dlevels = (g.flip(0).cumsum(0).flip(0) if levels > 1 else g).flatten(0, 1)
            sampled = products.sample(latents, dlevels, W_dec, self.blocks, len(y))
            result = Reconstruction(y_hats[-1], loss, dlevels, g.sum(0), sampled)
        return result if skipped is None else replace(result, y_hat=result.y_hat + skipped)

    def backward(
        self,
        inputs: Tensor,
        latents: Latents,
        dz: Tensor,
        dlevels: Tensor,
        subset: Tensor | None = None,
        sums: Mapping[str, Tensor] = NO_GRADIENTS,
    ) -> dict[str, Tensor]:
        """Gradients of the four common parameters; b_dec's is the part through the encoder.

        `inputs` [batch, d_in] of the encoder; `dlevels` [levels × batch, d_out] is the gradient of latents W_dec, `dz`
        that of the pre_acts at the entries. `subset`: indices of the latents that the columns stand for, None for all.
        `sums`: gradients at the entries of other parameters with one number per latent.
        """
        blocks = self.blocks if subset is None else blocks_of_subset(self.blocks, subset)
        spare = self._spare_gradients if subset is None else {}
        vectors = {"db_enc": dz, **sums}
        grads = products.weight_gradients(latents, dz, inputs, dlevels.to(self.matmul_dtype), blocks, spare, vectors)
        db_enc = grads.pop("db_enc")
        return {self.encoder_bias: db_enc, **grads, **self.through_encoder(db_enc, subset)}

    def through_encoder(self, db_enc: Tensor, subset: Tensor | None = None) -> dict[str, Tensor]:
        """b_dec's gradient through the encoder, from ∂L/∂b_enc of all latents of this rank or of some (indices [n]).

        Without other ranks it is that of b_dec; else the part of each block, for `sum_shared`.
        """
        if not self.centred:
            return {}
        # Σ_b −W_encᵀ g_b needs only the sum of g over the batch: two vectors instead of a dense product.
        W_enc = self.W_enc if subset is None else self.W_enc[subset]
        if self.ranks.is_whole:
            return {"b_dec": -(db_enc @ W_enc)}
        blocks = self.blocks if subset is None else blocks_of_subset(self.blocks, subset)
        return {THROUGH_ENCODER: torch.stack([-(db_enc[block.latents] @ W_enc[block.latents]) for block in blocks])}

    def output_gradients(self, x: Tensor, dy_hat: Tensor) -> dict[str, Tensor]:
        """Gradients of b_dec and W_skip as terms of y_hat, from ∂L/∂y_hat [batch, d_out]."""
        grads = {"b_dec": dy_hat.sum(0, dtype=x.dtype)}
        if "W_skip" in self.parameters:
            grads["W_skip"] = dy_hat.to(x.dtype).T @ x
        return grads

    # Publishing

    def calibrate(self, x: Tensor) -> None:
        """Estimates from scaled activations what inference needs and training does not; most need nothing.

        Collective.
        """
        return

    @classmethod
    def to_dictionary_learning(cls, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        """(dictionary_learning's class, its state dict) for a published SAE that this architecture trained."""
        return sae.activation.to_dictionary_learning(sae)

    @abstractmethod
    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        """(keys of SAELens' cfg.json, float32 weights for scaled activations).

        The weights have a row for each of `latents`, which are counted from the first of this rank.
        """
