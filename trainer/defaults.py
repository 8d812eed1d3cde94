"""Defaults that follow from the number of tokens an SAE will train on.

Long runs, and runs without an end, take the published values: the learning rate 2e-4 / sqrt(d_sae / 2¹⁴) of
dictionary_learning and sparsify, after Gao et al. (2024, arXiv 2406.04093), a warm-up of a million tokens, and silent
latents revived after `dead_tokens`. A shorter run has fewer steps to arrive, so its rate is higher and its spans are
shorter:

    learning rate  that of long runs × (LONG_RUN / tokens)^(1/3), for fewer tokens than LONG_RUN
    warm-up        a fifteenth of the tokens, at most 1,000,000
    revival        after a 150th of the tokens, at least 10,000, at most dead_tokens

LONG_RUN is fitted to runs of 0.2 to 1.5 million tokens (docs/science.md); between those and LONG_RUN nothing was
measured. That a best rate falls as a power of the tokens is known of language models (Bjorck et al. 2024, arXiv
2409.19913). Light: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.saes.settings import SaeSettings
from trainer.settings import OptimizerSettings
from trainer.training.optimizers.registry import OPTIMIZERS

LONG_RUN = 800_000_000
"""Tokens from which on a run is long."""
SHORTEST_RUN = 100_000
"""Tokens below which the learning rate rises no further."""
LONGEST_WARMUP = 1_000_000
SHORTEST_REVIVAL = 10_000


def default_learning_rate(d_sae: int, tokens: int | None) -> float:
    """Adam's rate for an SAE of `d_sae` latents that trains on `tokens`; None: without an end."""
    long_run = 2e-4 / (d_sae / 2**14) ** 0.5
    if tokens is None:
        return long_run
    return long_run * max(1.0, LONG_RUN / max(SHORTEST_RUN, tokens)) ** (1 / 3)


def default_warmup_tokens(tokens: int | None) -> int:
    """Tokens over which the learning rate rises."""
    return LONGEST_WARMUP if tokens is None else min(LONGEST_WARMUP, tokens // 15)


def default_revive_tokens(dead_tokens: int, tokens: int | None) -> int:
    """Tokens of silence after which a latent is revived."""
    return dead_tokens if tokens is None else min(dead_tokens, max(SHORTEST_REVIVAL, tokens // 150))


def planned_tokens(budget: int | None, run_tokens: int | None, joined_at: int = 0) -> int | None:
    """Tokens that an SAE will train on: its budget, or what is left of the run when it joins; None: without an end."""
    left = None if run_tokens is None else run_tokens - joined_at
    ends = [tokens for tokens in (budget, left) if tokens is not None]
    return min(ends, default=None)


@dataclass(frozen=True)
class LengthSettings:
    """Settings that follow from the number of tokens, unless they are set."""

    learning_rate: float
    warmup_tokens: int
    revive_tokens: int

    @classmethod
    def of(cls, sae: SaeSettings, optimizer: OptimizerSettings, tokens: int | None) -> LengthSettings:
        """Those of an SAE that trains on `tokens`; None: without an end."""
        warmup = optimizer.warmup_tokens
        default_rate = OPTIMIZERS[sae.optimizer].rate_factor * default_learning_rate(sae.d_sae, tokens)
        return cls(
            sae.learning_rate or optimizer.learning_rate or default_rate,
            default_warmup_tokens(tokens) if warmup is None else warmup,
            sae.revive_tokens or default_revive_tokens(sae.dead_tokens, tokens),
        )
