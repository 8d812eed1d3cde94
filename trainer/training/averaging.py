"""The mean of an SAE's recent weights, published beside the SAE as NAME-ema."""

from __future__ import annotations

import copy
import math

from torch import Tensor

from trainer.saes.base import Sae
from trainer.saes.settings import SHARED_PARAMETERS


class AverageWeights:
    """An exponential moving average over about `window_tokens` tokens, in memory of its own."""

    def __init__(self, parameters: dict[str, Tensor], window_tokens: int) -> None:
        self.parameters = {name: value.clone() for name, value in parameters.items()}
        self._window_tokens = window_tokens

    def update(self, parameters: dict[str, Tensor], batch_tokens: int, tokens: int) -> None:
        """Adds the weights after a step on `batch_tokens` of the SAE's `tokens` tokens."""
        # A plain mean at first, so that the first weights do not linger.
        weight = max(1 - math.exp(-batch_tokens / self._window_tokens), batch_tokens / tokens)
        for name, value in self.parameters.items():
            value.lerp_(parameters[name], min(1.0, weight))

    def replace_latents(self, parameters: dict[str, Tensor], latents: Tensor) -> None:
        """Takes the present weights of `latents` (indices), whose earlier ones mean nothing any more."""
        for name in self.parameters.keys() - set(SHARED_PARAMETERS):
            self.parameters[name][latents] = parameters[name][latents]

    def copy_of(self, sae: Sae) -> Sae:
        """`sae` with the mean weights; changing the copy changes neither."""
        average = copy.copy(sae)
        average.parameters = {name: value.clone() for name, value in self.parameters.items()}
        return average
