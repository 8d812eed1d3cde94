"""Passes of the language model over held-out text: what is seen at its hooks, what is put there, which rows count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from monitor.evaluation.held_out import EvaluationError
from producer.corpus.windows import Windows
from producer.lm.model import LanguageModel

Rows = Mapping[str, Tensor]
"""Activations by hook, each [rows, width]."""
NormBounds = Mapping[str, float]
"""By hook, the longest norm of a row that the stream takes; longer ones no SAE of the run has seen."""
Act = Callable[[Tensor], Tensor]
"""Is shown an activation [windows, context, width] and returns what takes its place."""


@dataclass(frozen=True)
class MemoryLimits:
    """Elements of the largest tensors that one pass holds; 2^24 are 64 MB in float32."""

    logits: int = 1 << 24
    """Of one logits tensor; a pass holds about six."""
    latents: int = 1 << 24
    """Of the latents of one SAE, all of them of some activations."""
    firings: int = 1 << 24
    """Activations of latents gathered for their pages, 8 bytes each: an SAE that is not yet sparse reads less text."""

    def batch(self, d_sae: int) -> int:
        """Activations that are encoded at a time."""
        return max(1, self.latents // d_sae)


DEFAULT_MEMORY = MemoryLimits()


def windows_in_memory(model: LanguageModel, context: int, memory: MemoryLimits = DEFAULT_MEMORY) -> int:
    """Windows of `context` tokens in one pass."""
    return max(1, memory.logits // (context * model.vocabulary))


def passes(
    model: LanguageModel, windows: Windows, memory: MemoryLimits = DEFAULT_MEMORY
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, kept, predicted) of as many windows as their logits fit into memory, on the model's device.

    `predicted` [windows, context − 1] is True where a token that is no padding follows one that is none.
    """
    count = windows_in_memory(model, windows.ids.shape[1], memory)
    for start in range(0, len(windows.ids), count):
        chosen = slice(start, start + count)
        real = ~windows.padded[chosen]
        parts = (windows.ids[chosen], windows.kept[chosen], real[:, :-1] & real[:, 1:])
        tokens, kept, predicted = (torch.from_numpy(part).to(model.device) for part in parts)
        yield tokens, kept, predicted


def recording(hooks: Sequence[str], seen: dict[str, Tensor]) -> dict[str, Act]:
    """Changes nothing and puts each activation into `seen`, in the order in which the model computes them."""

    def record(hook: str, activation: Tensor) -> Tensor:
        seen[hook] = activation.clone()  # models may write into a tensor after the hook has seen it
        return activation

    return {hook: partial(record, hook) for hook in hooks}


def splicing(streamed: Tensor, rows: Rows) -> dict[str, Act]:
    """Puts `rows` where `streamed` [windows, context] is True, at the hooks they are named for."""

    def splice(new: Tensor, activation: Tensor) -> Tensor:
        replaced = activation.clone()
        replaced[streamed] = new.to(activation.dtype)
        return replaced

    return {hook: partial(splice, new) for hook, new in rows.items()}


def in_stream(seen: Rows, kept: Tensor, bounds: NormBounds) -> Tensor:
    """Which positions [windows, context] the stream has: one hook's norm beyond its bound drops the row at all hooks.

    As the producer does it, a row that is not finite is no outlier.
    """
    streamed = kept
    for hook, bound in bounds.items():
        norm = torch.linalg.vector_norm(seen[hook], dim=-1, dtype=torch.float32)
        streamed = streamed & ((norm <= bound) | ~norm.isfinite())
    return streamed


def refuse_unknown_bounds(hooks: Sequence[str], bounds: NormBounds) -> None:
    if unknown := sorted(bounds.keys() - set(hooks)):
        raise EvaluationError(
            f"the stream drops rows by their norm at {', '.join(unknown)}, which the run file's model.hooks lacks; "
            "give the monitor the run file that the producers have"
        )
