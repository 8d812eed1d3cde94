"""Adam for the rows of latents, with a decoder that stays on the unit sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.kernels.operands import Operands
from trainer.kernels.sparse import kernels
from trainer.parallel.blocks import LatentBlock
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.settings import OptimizerSettings
from trainer.state.format import AdamState


class RowAdam:
    """Adam over an SAE's parameters; with `unit_decoder` the rows of W_dec stay on the unit sphere.

    Their gradient is projected onto the tangent plane, and after Adam's update, which leaves the sphere even so, they
    are normalised. `operands` holds copies of weights that are written along with them.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        settings: OptimizerSettings,
        unit_decoder: bool = True,
        operands: Operands | None = None,
        ranks: Ranks = ALONE,
        blocks: Sequence[LatentBlock] = (),
    ) -> None:
        """`ranks` share the latents, of which this one holds `blocks`; alone it needs none."""
        self.parameters = parameters
        self.clip = settings.clip
        self._betas, self._eps = (settings.betas[0], settings.betas[1]), settings.eps
        self._operands = operands or Operands()
        self._unit = {"W_dec"} if unit_decoder else set()
        self._ranks = ranks
        self._blocks = [block.latents for block in blocks] or [slice(None)]
        self._steps = 0
        self._moments = {name: (torch.zeros_like(W), torch.zeros_like(W)) for name, W in parameters.items()}

    def step(self, grads: dict[str, Tensor], learning_rate: float) -> float:
        """Updates the parameters in place; returns the gradient's norm before clipping.

        `grads` of parameters that are not trained are ignored. A gradient that is not finite changes nothing; the norm
        returned is not finite then. Collective: the norm is that of the latents of all ranks.
        """
        norm = self._squares(grads).sum().sqrt()
        length = float(norm)  # read once: on a GPU each read waits for everything in flight
        if not math.isfinite(length):
            return length
        scale = (self.clip / norm).clamp(max=1.0) if self.clip else torch.ones_like(norm)
        self._steps += 1
        for name, W in self.parameters.items():
            kernels(W.device).adam_rows(
                *(_rows(tensor) for tensor in (W, grads[name], *self._moments[name])),
                self._operands.writable(W),
                learning_rate, self._betas, self._eps, self._steps, scale.to(W.dtype), name in self._unit,
            )  # fmt: skip
        return length

    def _squares(self, grads: dict[str, Tensor]) -> Tensor:
        """|gradient|² of each parameter, float64 [parameters], after projection; shared parameters count once."""
        parts: dict[str, list[Tensor]] = {}
        for name, W in self.parameters.items():
            parts[name] = []
            for block in [slice(None)] if name in SHARED_PARAMETERS else self._blocks:
                tangent_to = _rows(W[block]) if name in self._unit else None
                parts[name].append(kernels(W.device).project(_rows(grads[name][block]), tangent_to).double().sum())
        of_latents = [name for name in parts if name not in SHARED_PARAMETERS]
        if of_latents and not self._ranks.is_whole:
            by_block = torch.stack([torch.stack(parts[name]) for name in of_latents], 1)
            for name, total in zip(of_latents, self._ranks.total(by_block, "scalars"), strict=True):
                parts[name] = [total]
        return torch.stack([part for (part,) in parts.values()])

    def reset_moments(self, latents: Tensor) -> None:
        """Zeroes the moments of `latents` (indices), whose weights were drawn anew."""
        for name, moments in self._moments.items():
            if name not in SHARED_PARAMETERS:
                for moment in moments:
                    moment[latents] = 0.0

    def state(self) -> AdamState:
        """The moments themselves, which the next step changes, and the count of steps."""
        return AdamState(
            steps=self._steps,
            exp_avg={name: first for name, (first, _) in self._moments.items()},
            exp_avg_sq={name: second for name, (_, second) in self._moments.items()},
        )

    def restore(self, state: AdamState) -> None:
        """Copies the moments that `state` returned."""
        self._steps = state.steps
        for name, (first, second) in self._moments.items():
            first.copy_(state.exp_avg[name])
            second.copy_(state.exp_avg_sq[name])


def _rows(tensor: Tensor) -> Tensor:
    """A vector as a matrix of one row."""
    return tensor if tensor.dim() == 2 else tensor[None]
