"""Passes of a language model over windows of text: activations recorded and replaced at its hooks, and which count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from producer.corpus.held_out import spread_order
from producer.corpus.rendering.windows import Windows
from producer.lm.model import LanguageModel

NormBounds = Mapping[str, float]
"""The largest norm of an activation in the stream, by hook; no SAE of the run was trained on larger ones."""
Replacement = Callable[[Tensor], Tensor]
"""Takes the activations [windows, context, width] of a hook and returns those to continue with."""


class WindowBatch(NamedTuple):
    """Some windows of text, on the model's device."""

    tokens: Tensor
    """Ids, int64 [windows, context]."""
    kept: Tensor
    """Positions that producers send unless their norm is beyond a bound, bool [windows, context]."""
    predicted: Tensor
    """Positions where a token that is no padding follows one that is none, bool [windows, context − 1]."""
    padding: Tensor
    """Positions without text, bool [windows, context]."""


@dataclass(frozen=True)
class MemoryLimits:
    """Elements of the largest tensors that one pass holds; 2^24 are 64 MB in float32."""

    logits: int = 1 << 24
    """Elements of one logits tensor; a pass holds about six."""
    latents: int = 1 << 24
    """Elements of the latents of one SAE, all of them of some activations."""
    firings: int = 1 << 24
    """Activations of latents gathered for their pages, 8 bytes each: an SAE that is not yet sparse reads less text."""

    def batch(self, d_sae: int) -> int:
        """Activations that are encoded at a time."""
        return max(1, self.latents // d_sae)


DEFAULT_MEMORY = MemoryLimits()


@dataclass
class TimeLimit:
    """The time that an evaluation may compute; what it rests between passes does not count."""

    seconds: float = inf
    began: float = field(default_factory=time.monotonic)
    rested: float = 0.0

    def rest(self, between: Callable[[], None]) -> None:
        """Calls what may rest."""
        before = time.monotonic()
        between()
        self.rested += time.monotonic() - before

    def is_over(self, share: float = 1.0) -> bool:
        """Whether a share of the time is used up."""
        return time.monotonic() - self.began - self.rested >= share * self.seconds


def windows_in_memory(model: LanguageModel, context: int, memory: MemoryLimits = DEFAULT_MEMORY) -> int:
    """Windows of `context` tokens in one pass."""
    return max(1, memory.logits // (context * model.vocabulary))


def passes(model: LanguageModel, windows: Windows, memory: MemoryLimits = DEFAULT_MEMORY) -> Iterator[WindowBatch]:
    """Batches of as many windows as their logits fit into memory."""
    count = windows_in_memory(model, windows.ids.shape[1], memory)
    for start in range(0, len(windows.ids), count):
        yield window_batch(model, windows, slice(start, start + count))


def window_batch(model: LanguageModel, windows: Windows, batch: slice | np.ndarray) -> WindowBatch:
    """Some of the windows, by a slice or by number."""
    real = ~windows.padded[batch]
    parts = (windows.ids[batch], windows.kept[batch], real[:, :-1] & real[:, 1:], ~real)
    return WindowBatch(*(torch.from_numpy(part).to(model.device) for part in parts))


def spread_passes(
    model: LanguageModel, windows: Windows, corpora: Mapping[str, slice], memory: MemoryLimits = DEFAULT_MEMORY
) -> Iterator[tuple[str, WindowBatch]]:
    """Batches of windows, each of one corpus, in an order whose every beginning is spread over each corpus."""
    count = windows_in_memory(model, windows.ids.shape[1], memory)
    batches: list[tuple[float, str, np.ndarray]] = []
    for corpus, part in corpora.items():
        numbers = np.arange(len(windows))[part]
        numbers = numbers[spread_order(len(numbers))]
        parts = np.split(numbers, range(count, len(numbers), count))
        batches += [((place + 0.5) / len(parts), corpus, some) for place, some in enumerate(parts)]
    for _, corpus, some in sorted(batches, key=lambda batch: batch[0]):
        yield corpus, window_batch(model, windows, some)


def activations_by_hook(model: LanguageModel, batch: WindowBatch) -> dict[str, Tensor]:
    """The activations [windows, context, width] of a pass, by hook."""
    names = [hook.name for hook in model.hooks]
    return dict(zip(names, model.activations(batch.tokens, batch.padding), strict=True))


def recording(hooks: Sequence[str], recorded: dict[str, Tensor]) -> dict[str, Replacement]:
    """Changes nothing and puts the activations into `recorded`, in the order in which the model computes them."""

    def record(hook: str, activations: Tensor) -> Tensor:
        recorded[hook] = activations.clone()  # models may write into a tensor after the hook was called with it
        return activations

    return {hook: partial(record, hook) for hook in hooks}


def splicing(streamed: Tensor, new: Mapping[str, Tensor]) -> dict[str, Replacement]:
    """Puts the `new` activations of each hook, [n, width] or [width], where `streamed` [windows, context] is True."""

    def splice(values: Tensor, activations: Tensor) -> Tensor:
        result = activations.clone()
        result[streamed] = values.to(activations.dtype)
        return result

    return {hook: partial(splice, values) for hook, values in new.items()}


def log_probabilities(logits: Tensor, predicted: Tensor) -> Tensor:
    """Of the next token at the `predicted` positions of a batch, [predictions, vocabulary], in float32 at least."""
    selected = logits[:, :-1][predicted]
    return torch.log_softmax(selected.to(torch.promote_types(selected.dtype, torch.float32)), -1)


def in_stream(activations: Mapping[str, Tensor], kept: Tensor, bounds: NormBounds) -> Tensor:
    """Positions [windows, context] that the stream has: a norm beyond the bound of one hook drops them at all hooks.

    As in the producer, an activation that is not finite is no outlier.
    """
    streamed = kept
    for hook, bound in bounds.items():
        norm = torch.linalg.vector_norm(activations[hook], dim=-1, dtype=torch.float32)
        streamed = streamed & ((norm <= bound) | ~norm.isfinite())
    return streamed
