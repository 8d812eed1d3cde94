"""The parameters of an SAE: their shapes, their first values, and those of published weights or of a reset.

Every parameter has a name. Those with one row per latent hold the rows of this rank's latents; b_dec and W_skip are the
same on all ranks. See `base` for what they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.parallel import products
from trainer.parallel.blocks import blocks_of, segment_ends
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.initial import initial_bias, initial_directions, normalise_rows
from trainer.saes.published import ALL_LATENTS
from trainer.saes.settings import SHARED_PARAMETERS, SaeSettings

RATE_ROWS = 8192
"""Rows from which the initial firing rates of latents are estimated."""
LATENTS_AT_ONCE = 4096
"""Latents whose firing rates are estimated at a time."""


class SaeParameters:
    """The parameters of one SAE on one rank: float32 masters, which the optimizer changes in place."""

    settings: SaeSettings
    encoder_bias = "b_enc"
    """Name of the bias of the pre_acts among the parameters."""

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
        sample = self.encoder_input(x[:RATE_ROWS].to(self.W_enc.device))
        rank = min(len(sample), max(1, round((1 - rate) * len(sample))))
        weights = [W for block in self.blocks for W in self.W_enc[block.latents].split(LATENTS_AT_ONCE)]
        quantiles = [(sample @ W.T).kthvalue(rank, dim=0).values for W in weights]
        self.b_enc.copy_(level - torch.cat(quantiles))

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

    def encoder_input(self, x: Tensor) -> Tensor:
        """x [rows, d_in] of scaled activations, centred where this SAE centres its input."""
        return x - self.b_dec if self.centred else x

    def common_weights(self, latents: slice = ALL_LATENTS) -> dict[str, Tensor]:
        """Copies of W_enc, W_dec, b_enc, b_dec and W_skip, decoder rows of unit norm where they are kept so."""
        weights = {name: getattr(self, name)[latents].clone() for name in ("W_enc", "W_dec", "b_enc")}
        weights["b_dec"] = self.b_dec.clone()
        if self.unit_decoder:
            normalise_rows(weights["W_dec"])
        if "W_skip" in self.parameters:
            weights["W_skip"] = self.parameters["W_skip"].clone()
        return weights
