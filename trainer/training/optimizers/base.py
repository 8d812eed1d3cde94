"""A step on the weights of an SAE, with a decoder that stays on the unit sphere; a subclass is one optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trainer.kernels.operands import Operands
from trainer.kernels.sparse import kernels
from trainer.parallel.blocks import LatentBlock
from trainer.parallel.ranks import ALONE, Ranks
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.settings import OptimizerSettings
from trainer.state.format import OptimizerState


class Optimizer(ABC):
    """Changes an SAE's parameters; with `unit_decoder` the rows of W_dec stay on the unit sphere.

    Their gradient is projected onto the tangent plane, and after the update, which leaves the sphere even so, they are
    normalised. `operands` holds copies of weights that are written along with them.
    """

    MOMENTS: ClassVar[tuple[str, ...]]
    """Names of the tensors that it keeps for each parameter, in the shape of the parameter."""
    SCALARS: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that it keeps."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        settings: OptimizerSettings,
        unit_decoder: bool = True,
        operands: Operands | None = None,
        ranks: Ranks = ALONE,
        blocks: Sequence[LatentBlock] = (),
        d_sae: int = 0,
    ) -> None:
        """`ranks` share the `d_sae` latents, of which this one holds `blocks`; alone it needs neither."""
        self.parameters = parameters
        self.clip = settings.clip
        self._operands = operands or Operands()
        self._unit = {"W_dec"} if unit_decoder else set()
        self._ranks = ranks
        self._blocks = [block.latents for block in blocks] or [slice(None)]
        self._d_sae = d_sae
        self._steps = 0
        self._moments = {
            moment: {name: torch.zeros_like(W) for name, W in parameters.items() if self.has_moment(moment, W)}
            for moment in self.MOMENTS
        }
        self._scalars = dict.fromkeys(self.SCALARS, 0.0)

    def has_moment(self, moment: str, W: Tensor) -> bool:
        """A parameter of this shape has the moment."""
        return True

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
        self._begin_step(learning_rate)
        for name in self.parameters:
            self._update(name, grads[name], learning_rate, scale)
        return length

    def _begin_step(self, learning_rate: float) -> None:
        """Changes the numbers that all parameters share."""
        return

    @abstractmethod
    def _update(self, name: str, grad: Tensor, learning_rate: float, scale: Tensor) -> None:
        """Changes one parameter by grad · scale; `scale` is a 0-d tensor. Step `_steps`, counted from 1. Collective."""

    def _squares(self, grads: dict[str, Tensor]) -> Tensor:
        """|gradient|² of each parameter, float64 [parameters], after projection; shared parameters count once."""
        parts: dict[str, list[Tensor]] = {}
        for name, W in self.parameters.items():
            parts[name] = []
            for block in self.blocks_of(name):
                tangent_to = rows_of(W[block]) if name in self._unit else None
                parts[name].append(kernels(W.device).project(rows_of(grads[name][block]), tangent_to).double().sum())
        of_latents = [name for name in parts if name not in SHARED_PARAMETERS]
        if of_latents and not self._ranks.is_whole:
            by_block = torch.stack([torch.stack(parts[name]) for name in of_latents], 1)
            for name, total in zip(of_latents, self._ranks.total(by_block, "scalars"), strict=True):
                parts[name] = [total]
        return torch.stack([part for (part,) in parts.values()])

    def blocks_of(self, name: str) -> list[slice]:
        """The rows of a parameter over which sums are formed."""
        return [slice(None)] if name in SHARED_PARAMETERS else self._blocks

    def reset_latents(self, latents: Tensor) -> None:
        """Forgets the past of `latents` (indices), whose weights were drawn anew."""
        for moments in self._moments.values():
            for name, moment in moments.items():
                if name not in SHARED_PARAMETERS:
                    moment[latents] = 0.0

    def state(self) -> OptimizerState:
        """The moments themselves, which the next step changes, and the count of steps."""
        moments = {moment: dict(of_parameters) for moment, of_parameters in self._moments.items()}
        return OptimizerState(self._steps, moments, dict(self._scalars))

    def restore(self, state: OptimizerState) -> None:
        """Copies the moments that `state` returned."""
        self._steps = state.steps
        self._scalars = dict(state.scalars)
        for moment, tensors in self._moments.items():
            for name, tensor in tensors.items():
                tensor.copy_(state.moments[moment][name])


def rows_of(tensor: Tensor) -> Tensor:
    """A vector as a matrix of one row."""
    return tensor if tensor.dim() == 2 else tensor[None]
