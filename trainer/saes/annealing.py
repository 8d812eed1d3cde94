"""Sparsity schedules: what of an SAE's sparsity changes over its own tokens.

    anneal_from  ╲
                   ╲
    k, target_l0     ╰──────────────▶ tokens
                 anneal_tokens

With more latents active at first, more of them learn before they compete (sparsify and OpenMOSS anneal k so).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from producer.common.fields import Natural, Positive
from trainer.saes.settings import SaeSettings

DEFAULT_START = 4
"""Active latents at the start, in units of those at the end."""


def linear(start: float, end: float, span: int, tokens: int) -> float:
    """From `start` to `end` over the first `span` tokens; then `end`."""
    return end if tokens >= span else start + (end - start) * tokens / span


class AnnealedSettings(SaeSettings):
    """Settings of an SAE whose number of active latents is set, and may fall to it."""

    TARGET: ClassVar[str]
    """The key that sets the number of active latents."""

    anneal_tokens: Natural = 0
    """Active latents fall linearly from anneal_from to k or target_l0 over the first of its tokens, so many; 0: there
    are so many from the first step on."""
    anneal_from: Positive | None = None
    """Active latents at the start, with anneal_tokens; without it, four times as many as in the end."""

    @property
    def first_active(self) -> float:
        """Active latents at the start."""
        target = float(getattr(self, self.TARGET))
        return float(self.anneal_from or min(self.d_sae, DEFAULT_START * target)) if self.anneal_tokens else target

    def active_latents(self, tokens: int) -> float:
        """Active latents that are aimed at after `tokens` tokens of the SAE."""
        return linear(self.first_active, getattr(self, self.TARGET), self.anneal_tokens, tokens)

    def faults(self) -> Iterator[str]:
        target, start = getattr(self, self.TARGET), self.anneal_from
        if start is not None and not self.anneal_tokens:
            yield (
                f"anneal_from = {start} needs anneal_tokens, over which active latents fall to {self.TARGET}: set "
                "it, such as anneal_tokens = 1_000_000, or remove anneal_from"
            )
        elif start is not None and target is not None and not target < start <= self.d_sae:
            yield f"anneal_from = {start} must lie between {self.TARGET} = {target:g} and d_sae = {self.d_sae}"
        yield from super().faults()
