"""The unembedding: how a model turns its last residual stream into logits, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from producer.lm.hooks import HookLocation
from producer.lm.network import HookedNetwork


@dataclass(frozen=True)
class Unembedding:
    """The final norm and the head, without the norm's division by the size of the stream: one factor for all tokens."""

    W_U: Tensor
    """[vocabulary, width]"""
    gain: Tensor
    """[width], of the norm."""
    norm_subtracts_mean: bool
    """True for LayerNorm, False for RMSNorm."""

    def logits(self, x: Tensor) -> Tensor:
        """The change of the logits [vocabulary] when x [width] is added to the last residual stream, up to a factor."""
        x = x.to(self.W_U.device)
        x = x - x.mean() if self.norm_subtracts_mean else x
        # In float32, a part of the vocabulary at a time: the model's own type would round neighbours to ties.
        return torch.cat([rows.float() @ (self.gain * x) for rows in self.W_U.split(1 << 14)])


def find_unembedding(network: HookedNetwork) -> Unembedding | None:
    """The unembedding of a whole model; None when it has no head.

    The norm is measured by what it does, not read from its parameters: some models keep gain − 1.
    """
    head = network.module.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return None
    gain, subtracts_mean = torch.ones(head.weight.shape[1], device=head.weight.device), False
    norm = _final_norm(network, head)
    if norm is not None:
        # Mean 0 and mean square 1, so that normalising changes nothing; the bias is the same on both sides.
        x = torch.ones(1, 1, len(gain), device=head.weight.device, dtype=network.dtype)
        x[..., ::2] = -1
        with torch.inference_mode():
            gain = ((norm(x) - norm(-x)) / 2 * x).flatten().float()
            subtracts_mean = bool((norm(x + 3) - norm(x)).abs().max() < 0.05 * gain.abs().max())
    return Unembedding(head.weight, gain, subtracts_mean)


def _final_norm(network: HookedNetwork, head: nn.Module) -> nn.Module | None:
    """The module with one gain per channel whose output is the head's input; None when there is none."""
    outputs: dict[nn.Module, Tensor] = {}
    head_inputs: list[Tensor] = []
    width = head.get_parameter("weight").shape[1]
    functions = [
        (HookLocation(module, ""), partial(outputs.__setitem__, module))
        for module in network.module.modules()
        if isinstance(gain := getattr(module, "weight", None), Tensor) and gain.shape == (width,)
    ]
    network.logits(
        torch.zeros(1, 1, dtype=torch.int64), [*functions, (HookLocation(head, "", "input"), head_inputs.append)]
    )
    # Some models hand the head a slice, which is another tensor over the same numbers.
    pointer = head_inputs[0].data_ptr()
    return next((module for module, y in outputs.items() if y.data_ptr() == pointer), None)
