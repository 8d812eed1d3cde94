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
from trainer.parallel.blocks import blocks_of, blocks_of_subset, segment_ends
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.encoder import BlockwiseEncoder, Encoded
from trainer.saes.gradients import THROUGH_ENCODER, Gradients, Reconstruction
from trainer.saes.initial import initial_bias, initial_directions, normalise_rows
from trainer.saes.published import Activation, SaeWeights
from trainer.saes.settings import SHARED_PARAMETERS, SaeSettings

NO_GRADIENTS: Mapping[str, Tensor] = {}
RATE_ROWS = 8192
"""Rows from which the initial firing rates of latents are estimated."""
LATENTS_AT_ONCE = 4096
"""Latents whose firing rates are estimated at a time."""


class Sae(ABC):
    """One SAE in training. `parameters` are float32 masters, which the optimizer changes in place.

    A subclass is an architecture: it names its settings, and the activations that its snapshots are published with.
    """

    Settings: ClassVar[type[SaeSettings]]
    """[[sae]] of this architecture."""
    activations: ClassVar[tuple[Activation, ...]]
    """Activations of its snapshots; training may start from SAEs published with them (`startable`)."""

    settings: SaeSettings
    matmul_dtype: torch.dtype = torch.float32
    dense_above = DENSE_ABOVE
    """Fraction of active latents above which a full matrix holds them: a matter of speed alone."""
    encoder_bias = "b_enc"
    """Name of the bias of the pre_acts among the parameters."""
    trainable: frozenset[str] | None = None
    """Names of the parameters that the optimizer changes; None for all."""

    def __init__(
        self, settings: SaeSettings, widths: tuple[int, ...], d_out: int | None = None, ranks: Ranks = ALONE
    ) -> None:
        """`widths` of the hooks it reads; `d_out` is the width of a transcoder's target, None for all others.

        `ranks` share its latents.
        """
        self.settings = settings
        self.ranks = ranks
        self.widths = widths
        self.d_in = sum(widths)
        self.d_out = self.d_in if d_out is None else d_out
        self.d_sae = settings.d_sae
        self.is_transcoder = d_out is not None
        self.centred = settings.centred
        """b_dec is subtracted from x."""
        self.unit_decoder = settings.unit_decoder
        """Decoder rows are kept at unit norm; otherwise their norm is learned and folded into the encoder on export."""
        self.by_magnitude = False
        """Latents may be negative, and are selected by their magnitude."""
        self.latents = ranks.latents(self.d_sae)
        """The latents that this rank holds; d_sae is the number of all."""
        self.blocks = blocks_of(ranks.latent_blocks(self.d_sae), settings.levels)
        self.ends = segment_ends(self.blocks)
        """Ends of the segments of this rank's latents: without other ranks one per level."""
        if ranks.blocks > 1:
            self.dense_above = math.inf  # the bits of a dense product would depend on how many latents a rank holds
        self.variance = 1.0
        """Frozen total variance of scaled y: the unit of the reconstruction loss."""
        self.parameters: dict[str, Tensor] = {
            "W_enc": torch.zeros(len(self.latents), self.d_in),
            "W_dec": torch.zeros(len(self.latents), self.d_out),
            "b_enc": torch.zeros(len(self.latents)),
            "b_dec": torch.zeros(self.d_out),
        }
        if settings.skip:
            self.parameters["W_skip"] = torch.zeros(self.d_out, self.d_in)
        self.operands = Operands()
        self._encoder = BlockwiseEncoder()
        self._spare_gradients: dict[str, Tensor] = {}

    # Parameters by name; architectures that store them otherwise override these

    @property
    def W_enc(self) -> Tensor:
        return self.parameters["W_enc"]

    @property
    def W_dec(self) -> Tensor:
        return self.parameters["W_dec"]

    @property
    def b_enc(self) -> Tensor:
        return self.parameters[self.encoder_bias]

    @property
    def b_dec(self) -> Tensor:
        return self.parameters["b_dec"]

    # First weights

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Sets the parameters from a sample of scaled activations x [rows, d_in], y [rows, d_out]."""
        self.variance = float((y - y.mean(0)).double().square().sum(1).mean())
        directions = initial_directions(self.settings, x, generator, self.latents)
        self.b_dec.copy_(initial_bias(y, self.settings.initial_bias))
        self.W_enc.copy_(directions)
        if self.is_transcoder:
            # y_hat begins as the mean of the target, and pre_acts about zero, as in sparsify.
            centre = initial_bias(x, self.settings.initial_bias)
            self.b_enc.copy_(torch.cat([-(directions[block.latents] @ centre) for block in self.blocks]))
        else:
            self.W_dec.copy_(directions)

    def equalise_rates(self, x: Tensor, rate: float, level: float) -> None:
        """Sets b_enc such that each latent's pre_act exceeds `level` on the fraction `rate` of the rows x [rows, d_in].

        Without it, directions of large variance win on nearly every row at first, and all others begin dead.
        """
        sample = self._encoder_input(x[:RATE_ROWS].to(self.W_enc.device))
        rank = min(len(sample), max(1, round((1 - rate) * len(sample))))
        weights = [W for block in self.blocks for W in self.W_enc[block.latents].split(LATENTS_AT_ONCE)]
        quantiles = [(sample @ W.T).kthvalue(rank, dim=0).values for W in weights]
        self.b_enc.copy_(level - torch.cat(quantiles))

    @classmethod
    def startable(cls, settings: SaeSettings) -> frozenset[str]:
        """Names of the activations of published SAEs that training may start from."""
        return frozenset(activation.name for activation in cls.activations)

    def adapt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published weights, scaled as this SAE's, in a form that it can hold. Raises SnapshotError without one."""
        return weights

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Sets the parameters that `weights`, in this SAE's layout and scale, contain; those of this rank's latents."""
        for name in self.parameters.keys() & weights.keys():
            self.parameters[name].copy_(weights[name])
        if self.unit_decoder:
            normalise_rows(self.W_dec)

    def rows_of_rank(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of this rank's latents, and those that belong to no latent, of weights of all latents."""
        rows = slice(self.latents.start, self.latents.stop)
        return {name: value if name in SHARED_PARAMETERS else value[rows] for name, value in weights.items()}

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
        inputs, W_enc, b_enc = self._encoder_input(x), self.W_enc[latents], self.b_enc[latents]
        blocks = self.blocks if isinstance(latents, slice) else blocks_of_subset(self.blocks, latents)
        parts = [linear(inputs, W_enc[block.latents], b_enc[block.latents]) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _encoder_input(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.centred else x

    def operand(self, name: str) -> Tensor:
        """A weight matrix in the type of products."""
        return self.operands.of(getattr(self, name), self.matmul_dtype)

    def recycle(self, gradients: dict[str, Tensor]) -> None:
        """Gives the next step the memory of these gradients: to allocate it anew takes longer than to fill it."""
        self._spare_gradients = {name: gradients[name] for name in ("W_enc", "W_dec") if name in gradients}

    def reconstruct(self, latents: Latents, x: Tensor, y: Tensor) -> Reconstruction:
        """y_hat and its loss; `latents` are split at `ends`, and those up to the end of each level must reconstruct y.

        Collective.
        """
        W_dec, skipped = self.operand("W_dec"), x @ self.parameters["W_skip"].T if self.settings.skip else None
        y = y if skipped is None else y - skipped
        levels = len(self.settings.levels)
        weight = 1.0 / (levels * len(y) * self.variance)
        if levels == 1 and self.ranks.is_whole:
            y_hat, g, square, sampled = latents.decode(W_dec, self.b_dec, y, weight)
            result = Reconstruction(y_hat, weight * square.sum(), g, g, sampled)
        else:
            y_hats = products.multiply(self.ranks, latents, W_dec, self.blocks, len(y), levels)
            y_hats = (y_hats.cumsum(0) if levels > 1 else y_hats) + self.b_dec
            errors = y_hats - y
            g = 2 * weight * errors
            dlevels = (g.flip(0).cumsum(0).flip(0) if levels > 1 else g).flatten(0, 1)
            sampled = products.sample(latents, dlevels, W_dec, self.blocks, len(y))
            result = Reconstruction(y_hats[-1], weight * errors.square().sum(), dlevels, g.sum(0), sampled)
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

    def reinitialise(self, latents: Tensor, x: Tensor, y: Tensor) -> None:
        """Points `latents` (indices [n]) at the directions x [n, d_in] and y [n, d_out] (Bricken et al. 2023).

        Encoder rows get a fifth of the mean norm of the other latents' (of all, when there are no others), so that
        they begin with small activations. Collective; `latents` are those of this rank, perhaps none.
        """
        others = torch.ones(len(self.latents), dtype=torch.bool, device=latents.device)
        others[latents] = False
        if not self.ranks.count(int(others.sum())):
            others[latents] = True
        W_enc_rows, W_dec_rows = x.clone(), y.clone()
        normalise_rows(W_enc_rows)
        normalise_rows(W_dec_rows)
        encoder_norm, decoder_norm = products.mean_norms(self.ranks, (self.W_enc, self.W_dec), others, self.blocks)
        if not self.unit_decoder:
            W_dec_rows *= decoder_norm
        self.W_enc[latents] = 0.2 * encoder_norm * W_enc_rows
        self.b_enc[latents] = 0.0
        self.W_dec[latents] = W_dec_rows

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
    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """(keys of SAELens' cfg.json, float32 weights for scaled activations with a row per latent of this rank)."""

    def common_weights(self) -> dict[str, Tensor]:
        """Copies of W_enc, W_dec, b_enc, b_dec and W_skip, decoder rows of unit norm where they are kept so."""
        weights = {name: getattr(self, name).clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        if self.unit_decoder:
            normalise_rows(weights["W_dec"])
        if "W_skip" in self.parameters:
            weights["W_skip"] = self.parameters["W_skip"].clone()
        return weights
