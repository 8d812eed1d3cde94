"""What every sparse autoencoder has: parameters, a gradient for a batch, an inference form.

Inside, both matrices have one row per latent, contiguous, so that everything after the encoder touches rows only:
W_enc [d_sae, d_in], W_dec [d_sae, d_out]. Rows arrive scaled to a variance of 1 per element; what is published
takes raw activations.

    pre_acts = (x − b_dec) W_encᵀ + b_enc        latents = act(pre_acts)        y_hat = latents W_dec + b_dec

An autoencoder reconstructs y = x. A crosscoder does too, x being the rows of several hooks side by side. A transcoder
reconstructs another hook's y: b_dec is then not subtracted from x, W_dec begins at zero with free norms, and with
`skip` x W_skipᵀ is added to y_hat (arXiv 2406.11944, 2501.18823).

Matryoshka prefixes m_1 < … < m_G = d_sae (arXiv 2503.17547) replace the reconstruction loss by a mean over levels,

    L = 1/G Σ_g |y − y_hat_{≤ g}|² / variance        y_hat_{≤ g} = b_dec + Σ_{i < m_g} latents_i W_dec,i

so that a latent of segment g receives the sum of the gradients of levels ≥ g. One level is the ordinary loss.

Gradients are written out by hand, as sparse products (Gao et al. 2024, arXiv 2406.04093, appendix D), and are tested
against dense autograd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from trainer.kernels.operands import Operands
from trainer.kernels.select import DENSE_ABOVE, Latents, joined, largest, widen
from trainer.kernels.sparse import kernels
from trainer.saes.published import Activation, SaeWeights
from trainer.saes.settings import SaeSettings

SHARED = ("b_dec", "W_skip")
"""Parameters that belong to no single latent; all others have one row per latent."""
NO_SUMS: Mapping[str, Tensor] = {}
ROWS_AT_FIRST = 8192
LATENTS_AT_ONCE = 4096
"""The first biases are found from so many rows, for so many latents at a time."""
ROUND = 256
"""Numbers of dead latents are rounded up to multiples of it."""
BLOCK_BYTES, BLOCK_BYTES_ON_CPU = 2**30, 2**24
"""So much of the pre_acts is held at a time: they are chosen from while they are in reach of the caches."""


@dataclass(frozen=True)
class Gradients:
    """What one batch says: the gradient of every parameter, and what statistics need."""

    of: dict[str, Tensor]
    loss: dict[str, Tensor]
    """Parts of the loss, scalars."""
    y_hat: Tensor
    """[batch, d_out], in the scale of y."""
    fired: Latents
    """Latents of the batch, in segments when there are several levels; a value other than zero has fired."""


@dataclass(frozen=True)
class Encoded:
    """What the encoder makes of a batch."""

    read: Tensor
    """What its product took in, [batch, d_in] in the type of products: x without b_dec."""
    latents: list[Latents]
    """One set of active latents for each way of choosing."""
    kept: Tensor
    """Indices [n] of latents whose pre_acts are wanted afterwards: those to revive."""
    pre_acts: Tensor
    """[batch, n], theirs."""

    def padded(self, fill: float) -> tuple[Tensor, Tensor]:
        """`kept` and `pre_acts` with columns of `fill` added that stand for some latent again, to a round number.

        A CPU's products in bfloat16 are compiled for each shape they meet, and kept: with every other number of dead
        latents a step would take longer, and a run hundreds of megabytes.
        """
        more = -len(self.kept) % ROUND
        kept = torch.cat([self.kept, self.kept[:1].expand(more)])
        return kept, torch.nn.functional.pad(self.pre_acts, (0, more), value=fill)


@dataclass(frozen=True)
class Reconstruction:
    """What a set of latents makes of y, and the gradient of its loss."""

    y_hat: Tensor
    """[batch, d_out]"""
    loss: Tensor
    rows: Tensor
    """∂L/∂(latents W_dec) [levels × batch, d_out], one block per segment of the latents."""
    total: Tensor
    """∂L/∂y_hat summed over levels, [batch, d_out]: what b_dec and W_skip receive."""
    dlatents: Tensor
    """∂L/∂latents at the entries. Where latents are dense, whoever uses it sets it to zero beside them."""


class Sae(ABC):
    """One autoencoder in training. `parameters` are float32 masters, changed in place by the optimizer.

    A subclass is an architecture: it names its settings, and the activations under which it is published.
    """

    Settings: ClassVar[type[SaeSettings]]
    """[[sae]] of this architecture."""
    activations: ClassVar[tuple[Activation, ...]]
    """Those of its snapshots; training may start from an SAE published with one of them (`startable`)."""

    settings: SaeSettings
    matmul_dtype: torch.dtype = torch.float32
    dense_above = DENSE_ABOVE
    """Fraction of active latents above which those of a batch are a full matrix: a matter of speed alone."""
    encoder_bias = "b_enc"
    """Name of the parameter that pre_acts contain."""
    trained: frozenset[str] | None = None
    """Names of the parameters that learn; None for all."""

    def __init__(self, settings: SaeSettings, widths: tuple[int, ...], d_out: int | None = None) -> None:
        """`widths` of the hooks it reads; `d_out` is the width of a transcoder's target, None for all others."""
        self.settings = settings
        self.widths = widths
        self.d_in = sum(widths)
        self.d_out = self.d_in if d_out is None else d_out
        self.d_sae = settings.d_sae
        self.is_transcoder = d_out is not None
        self.centred = settings.centred
        """b_dec is subtracted from x."""
        self.unit_decoder = settings.unit_decoder
        """Decoder rows are kept at unit norm; otherwise their norm is learned and folded into the encoder on export."""
        self.magnitude = False
        """Latents may be negative, and are chosen by their magnitude."""
        self.ends = tuple(settings.levels)
        self.variance = 1.0
        """Frozen total variance of scaled y: the reconstruction loss is in units of it."""
        self.parameters: dict[str, Tensor] = {
            "W_enc": torch.zeros(self.d_sae, self.d_in),
            "W_dec": torch.zeros(self.d_sae, self.d_out),
            "b_enc": torch.zeros(self.d_sae),
            "b_dec": torch.zeros(self.d_out),
        }
        if settings.skip:
            self.parameters["W_skip"] = torch.zeros(self.d_out, self.d_in)
        self.operands = Operands()
        self._spare: dict[str, Tensor] = {}
        self._block = torch.empty(0)

    # The parts by name; architectures that keep them otherwise override these

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

    # Beginning

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Sets the parameters from a sample of scaled rows x [rows, d_in], y [rows, d_out]."""
        self.variance = float((y - y.mean(0)).double().square().sum(1).mean())
        directions = self._directions(x, generator)
        b_dec = initial_bias(y, self.settings.initial_bias)
        self.b_dec.copy_(b_dec)
        self.W_enc.copy_(directions)
        if self.is_transcoder:
            # Begins as the target's mean, and with pre_acts about zero (sparsify's choice).
            self.b_enc.copy_(-(directions @ initial_bias(x, self.settings.initial_bias)))
        else:
            self.W_dec.copy_(directions)

    def equalise(self, x: Tensor, rate: float, level: float) -> None:
        """Sets b_enc such that each latent's pre_act exceeds `level` on the fraction `rate` of the rows x [rows, d_in].

        Without it, directions of large variance win nearly every row at first, and the rest begins dead.
        """
        sample = self._encoded(x[:ROWS_AT_FIRST].to(self.W_enc.device))
        rank = min(len(sample), max(1, round((1 - rate) * len(sample))))
        quantile = [(sample @ some.T).kthvalue(rank, dim=0).values for some in self.W_enc.split(LATENTS_AT_ONCE)]
        self.b_enc.copy_(level - torch.cat(quantile))

    def _directions(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Unit rows [d_sae, d_in]: random, or 4 parts towards random rows of the centred data and 1 part random."""
        directions = torch.randn(self.d_sae, self.d_in, generator=generator)
        normalise_rows(directions)
        if self.settings.initial_directions == "data":
            # With enough rows no two latents begin alike.
            order = torch.randperm(len(x), generator=generator)
            towards = (x - x.mean(0))[order.repeat(-(-self.d_sae // len(x)))[: self.d_sae]]
            normalise_rows(towards)
            directions = 0.8 * towards + 0.2 * directions
            normalise_rows(directions)
        return directions

    @classmethod
    def startable(cls, settings: SaeSettings) -> frozenset[str]:
        """Names of the activations of published SAEs that training may start from."""
        return frozenset(activation.name for activation in cls.activations)

    def adapt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published weights, in this SAE's scale, as ones it can hold. Raises SnapshotError when it cannot."""
        return weights

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Takes over published weights, brought into this SAE's layout and scale: parameters it knows, by name."""
        for name in self.parameters.keys() & weights.keys():
            self.parameters[name].copy_(weights[name])
        if self.unit_decoder:
            normalise_rows(self.W_dec)

    # Learning

    @abstractmethod
    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        """The loss of a batch and its gradient.

        x [batch, d_in], y [batch, d_out] scaled; dead [d_sae] bool: latents to revive; `sparsity`: the part of the
        penalty's weight that is in force.
        """

    def after_step(self) -> None:
        """Restores what the optimizer does not know. Decoder rows of unit norm it knows."""
        return

    def encode(
        self, x: Tensor, kept: Tensor, *choices: Callable[[Tensor], Latents], less: Tensor | float = 0.0
    ) -> Encoded:
        """The one dense product of a step, in blocks of rows; `choices` take [rows, d_sae] of it, less `less`.

        A block is overwritten by the next, so that the whole product never has to be held; `kept` are the latents
        whose pre_acts are.
        """
        # b_dec is subtracted before rounding: in bfloat16 it would cost the digits that matter.
        centred = kernels(x.device).centred
        read = centred(x, self.b_dec, self.matmul_dtype) if self.centred else x.to(self.matmul_dtype)
        W_enc = self.operand("W_enc")
        bias = (self.b_enc - less).to(self.matmul_dtype)
        block_bytes = BLOCK_BYTES_ON_CPU if x.device.type == "cpu" else BLOCK_BYTES
        rows = max(256, block_bytes // (self.d_sae * W_enc.element_size()))
        if self._block.shape != (min(rows, len(x)), self.d_sae) or self._block.dtype != self.matmul_dtype:
            self._block = read.new_empty(min(rows, len(x)), self.d_sae)
        parts: list[list[Latents]] = [[] for _ in choices]
        pre_acts_kept = read.new_empty(len(x), len(kept))
        for begin in range(0, len(x), rows):
            some = read[begin : begin + rows]
            pre_acts = torch.addmm(bias, some, W_enc.T, out=self._block[: len(some)])
            for part, choose in zip(parts, choices, strict=True):
                part.append(choose(pre_acts))
            if len(kept):
                pre_acts_kept[begin : begin + rows] = pre_acts[:, kept]
        return Encoded(read, [joined(part) for part in parts], kept, pre_acts_kept)

    def revived(self, dead: Tensor) -> Tensor:
        """Indices of the latents that a loss of their own revives, of those that are dead [d_sae]."""
        return dead.nonzero().squeeze(1) if self.settings.revival == "auxk" else dead.new_empty(0, dtype=torch.int64)

    def in_float32(self, x: Tensor, latents: Tensor | slice = slice(None)) -> Tensor:
        """pre_acts as inference will have them, [batch, n]; `latents` are indices [n] of some."""
        return linear(self._encoded(x), self.W_enc[latents], self.b_enc[latents])

    def _encoded(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.centred else x

    def operand(self, name: str) -> Tensor:
        """A weight matrix in the type of products."""
        return self.operands.of(getattr(self, name), self.matmul_dtype)

    def recycle(self, gradients: dict[str, Tensor]) -> None:
        """Lends the next step the memory of these gradients: to get it anew takes longer than to fill it."""
        self._spare = {name: gradients[name] for name in ("W_enc", "W_dec") if name in gradients}

    def reconstruct(self, latents: Latents, x: Tensor, y: Tensor) -> Reconstruction:
        """`latents` are split at `ends`; with several levels each of them has to reconstruct y."""
        W_dec, skipped = self.operand("W_dec"), x @ self.parameters["W_skip"].T if self.settings.skip else None
        y = y if skipped is None else y - skipped
        levels = len(self.ends)
        weight = 1.0 / (levels * len(y) * self.variance)
        if levels == 1:
            y_hat, rows, square, sampled = latents.decode(W_dec, self.b_dec, y, weight)
            found = Reconstruction(y_hat, weight * square.sum(), rows, rows, sampled)
        else:
            y_hats = latents.multiply(W_dec).view(levels, len(y), -1).cumsum(0) + self.b_dec
            errors = y_hats - y
            g = 2 * weight * errors
            rows = g.flip(0).cumsum(0).flip(0).flatten(0, 1)
            sampled = latents.sample(rows, W_dec)
            found = Reconstruction(y_hats[-1], weight * errors.square().sum(), rows, g.sum(0), sampled)
        return found if skipped is None else replace(found, y_hat=found.y_hat + skipped)

    def backward(
        self,
        read: Tensor,
        latents: Latents,
        dz: Tensor,
        rows: Tensor,
        only: Tensor | None = None,
        sums: Mapping[str, Tensor] = NO_SUMS,
    ) -> dict[str, Tensor]:
        """Gradients of the four common parameters, b_dec's through the encoder.

        `read` [batch, d_in] is what the encoder saw; latents W_dec received `rows` [levels × batch, d_out], pre_acts
        received `dz` at the entries. `only` are the latents that the columns stand for, when they are not all. `sums`
        are gradients at the entries of other parameters that each latent has one of.
        """
        by_latent = latents.transpose()
        db_enc = by_latent.sums(dz)
        spare = self._spare if only is None else {}
        grads = {
            "W_enc": by_latent.multiply(dz, read, spare.pop("W_enc", None)),
            "W_dec": by_latent.multiply(latents.value, rows.to(self.matmul_dtype), spare.pop("W_dec", None)),
            self.encoder_bias: db_enc,
            **{name: by_latent.sums(value) for name, value in sums.items()},
        }
        if self.centred:
            # Σ_b −W_encᵀ g_b needs only the sum of g over the batch: two vectors instead of a dense product.
            grads["b_dec"] = -(db_enc @ (self.W_enc if only is None else self.W_enc[only]))
        return grads

    def output_gradients(self, x: Tensor, total: Tensor) -> dict[str, Tensor]:
        """Gradients of what is added to the latents' part of y_hat, from ∂L/∂y_hat [batch, d_out]."""
        grads = {"b_dec": total.sum(0, dtype=x.dtype)}
        if "W_skip" in self.parameters:
            grads["W_skip"] = total.to(x.dtype).T @ x
        return grads

    def auxiliary(
        self,
        grads: dict[str, Tensor],
        losses: dict[str, Tensor],
        encoded: Encoded,
        y: Tensor,
        y_hat: Tensor,
        plus: Tensor | None = None,
    ) -> None:
        """AuxK (Gao et al. 2024): lets dead latents explain the residual; adds to `grads` and `losses`.

            L_aux = w_aux · |e_hat − e|² / |e − mean(e)|²,  e = y − y_hat held constant,
            e_hat = ReLU(TopK_{k_aux}(pre_acts of dead latents)) W_dec, without b_dec

        `plus` [d_sae] is what pre_acts lack. ReLU as in the main path. Nothing happens when nothing is dead or nothing
        is left to explain.
        """
        if self.settings.revival != "auxk" or not len(encoded.kept):
            return
        k_aux = min(self.settings.k_aux or max(1, self.d_in // 2), len(encoded.kept))
        indices, of_dead = encoded.padded(0.0 if self.magnitude else -math.inf)  # never among the largest
        error = y - y_hat
        spread = (error - error.mean(0)).square().sum()
        if not spread > 0:
            return
        weight, W_dec = self.settings.aux_weight, self.operand("W_dec")[indices]
        of_dead = of_dead if plus is None else widen(of_dead) + plus[indices]
        latents = largest(of_dead, k_aux, magnitude=self.magnitude, dense_above=self.dense_above)
        difference = latents.multiply(W_dec) - error
        de_hat = difference * (2.0 * weight / spread)
        dz = latents.sample(de_hat, W_dec).mul_(latents.value != 0)
        add(grads, self.backward(encoded.read, latents, dz, de_hat, indices), indices)
        losses["auxiliary"] = weight * difference.square().sum() / spread

    # Starting anew

    def reinitialise(self, latents: Tensor, x: Tensor, y: Tensor) -> None:
        """Points `latents` (indices [n]) at the directions x [n, d_in] and y [n, d_out] (Bricken et al. 2023).

        Encoder rows get a fifth of the mean norm of the others (of all, when none is left), so that they begin quietly.
        """
        others = torch.ones(self.d_sae, dtype=torch.bool, device=latents.device)
        others[latents] = False
        if not others.any():
            others[latents] = True
        towards, decoded = x.clone(), y.clone()
        normalise_rows(towards)
        normalise_rows(decoded)
        if not self.unit_decoder:
            decoded *= self.W_dec[others].norm(dim=1).mean()
        self.W_enc[latents] = 0.2 * self.W_enc[others].norm(dim=1).mean() * towards
        self.b_enc[latents] = 0.0
        self.W_dec[latents] = decoded

    # Publishing

    def calibrate(self, x: Tensor) -> None:
        """Learns from scaled rows what inference needs and training does not; most need nothing."""
        return

    @classmethod
    def to_dictionary_learning(cls, sae: SaeWeights) -> tuple[str, dict[str, Tensor]]:
        """(dictionary_learning's class, its state dict) for a published SAE that this architecture trained."""
        return sae.activation.to_dictionary_learning(sae)

    @abstractmethod
    def export(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """(SAELens' architecture keys, weights in scaled units with one row per latent, float32)."""

    def common_weights(self) -> dict[str, Tensor]:
        """Copies of W_enc, W_dec, b_enc, b_dec and W_skip, decoder rows of unit norm where they are kept so."""
        W_dec = self.W_dec.clone()
        if self.unit_decoder:
            normalise_rows(W_dec)
        weights = {
            "W_enc": self.W_enc.clone(),
            "W_dec": W_dec,
            "b_enc": self.b_enc.clone(),
            "b_dec": self.b_dec.clone(),
        }
        if "W_skip" in self.parameters:
            weights["W_skip"] = self.parameters["W_skip"].clone()
        return weights


def add(grads: dict[str, Tensor], more: dict[str, Tensor], rows: Tensor | None = None) -> None:
    """Adds gradients in place; per-latent ones of `more` stand for the latents `rows`, when not for all."""
    for name, value in more.items():
        if name not in grads:
            grads[name] = value
        elif rows is None or name in SHARED:
            grads[name] += value
        else:
            grads[name].index_add_(0, rows, value)


def normalise_rows(W: Tensor) -> None:
    """Scales each row to unit norm, in place."""
    W.div_(W.norm(dim=1, keepdim=True).clamp_min_(1e-12))


def initial_bias(x: Tensor, how: str) -> Tensor:
    """The centre of rows [rows, d] that b_dec begins at: geometric_median, mean or zero."""
    if how == "zero":
        return torch.zeros(x.shape[1], device=x.device)
    return x.double().mean(0).float() if how == "mean" else geometric_median(x)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the smallest sum of distances to the rows of x [rows, d_in]; Weiszfeld's iteration, float64.

    Unlike the mean it hardly notices outliers. b_dec begins there in Bricken et al. 2023 and Gao et al. 2024 (arXiv
    2406.04093, appendix A).
    """
    x = x.double()
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1.0 / (x - median).norm(dim=1).clamp_min_(1e-8)
        moved = weight @ x / weight.sum()
        change = (moved - median).norm() / median.norm().clamp_min(1e-12)
        median = moved
        if change < tolerance:
            break
    return median.float()


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
