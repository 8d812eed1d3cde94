"""Learning rate, warm-up and revival of runs that do not set them: by the number of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small_saes import rows_of, sae_trainer_of, settings_of
from trainer.defaults import (
    LengthSettings,
    default_learning_rate,
    default_revive_tokens,
    default_warmup_tokens,
)
from trainer.settings import OptimizerSettings
from trainer.state.migrations import migrated
from trainer.training.sae_trainer import SaeTrainer


def sae_trainer(run_tokens: int | None, **of_sae: Any) -> SaeTrainer:
    """A trainer of 64 latents whose settings leave learning rate and warm-up open."""
    settings = settings_of("topk", d_sae=64, **of_sae)
    return sae_trainer_of(settings, run_tokens=run_tokens, learning_rate=None, warmup_tokens=None)


def test_a_run_without_an_end_takes_the_rate_of_long_runs() -> None:
    """2e-4 at 2¹⁴ latents, half of it at 2¹⁶."""
    assert (default_learning_rate(2**14, None), default_learning_rate(2**16, None)) == (2e-4, 1e-4)


def test_an_eighth_of_the_tokens_takes_twice_the_rate() -> None:
    """From 800 million tokens down to 100,000, where it is 20 times that of long runs."""
    rates = [default_learning_rate(2**14, tokens) for tokens in (10**12, 8 * 10**8, 10**8, 10**5, 1)]

    assert rates == pytest.approx([2e-4, 2e-4, 4e-4, 4e-3, 4e-3])


def test_the_warm_up_is_a_fifteenth_of_the_run() -> None:
    """Up to a million tokens, which a run without an end has."""
    assert [default_warmup_tokens(tokens) for tokens in (1_500_000, 10**9, None)] == [100_000, 1_000_000, 1_000_000]


def test_silent_latents_are_revived_after_a_150th_of_the_run() -> None:
    """From 10,000 tokens to dead_tokens."""
    spans = [default_revive_tokens(10_000_000, tokens) for tokens in (10**6, 15 * 10**6, 10**10, None)]

    assert spans == [10_000, 100_000, 10_000_000, 10_000_000]


def test_settings_win() -> None:
    """An SAE's own rate before the optimizer's; a warm-up of 0 is one."""
    optimizer = OptimizerSettings(learning_rate=1e-3, warmup_tokens=0)

    plain, own = settings_of("topk"), settings_of("topk", learning_rate=2e-3, revive_tokens=7)
    assert LengthSettings.of(plain, optimizer, None) == LengthSettings(1e-3, 0, plain.dead_tokens)
    assert LengthSettings.of(own, optimizer, 1000) == LengthSettings(2e-3, 0, 7)


def test_the_defaults_are_for_the_tokens_of_the_sae() -> None:
    """Its own budget, where that ends before the run."""
    rates = [sae_trainer(tokens, **own).schedule.peak for tokens, own in ((10**6, {}), (10**9, {"tokens": 10**6}))]

    assert rates == [default_learning_rate(64, 10**6)] * 2


def test_a_resumed_run_keeps_its_rate_when_it_is_made_longer() -> None:
    """What a checkpoint began with stays: rate, warm-up and revival."""
    first = sae_trainer(10**6)
    first.initialise(rows_of(first.settings, 64, 0), {"a": 1.0})
    resumed = sae_trainer(10**8)
    resumed.restore(*first.state())

    assert resumed.schedule.peak == first.schedule.peak != sae_trainer(10**8).schedule.peak
    assert resumed.schedule.warmup_tokens == first.schedule.warmup_tokens == 10**6 // 15


def test_a_checkpoint_of_earlier_releases_keeps_the_rate_of_long_runs() -> None:
    """They had no other default."""
    document = migrated({"format": 5, "saes": {"small": {"tokens": 64}}})
    assert document["saes"]["small"] == {"planned_tokens": None, "tokens": 64}

    first = sae_trainer(None)
    first.initialise(rows_of(first.settings, 64, 0), {"a": 1.0})
    resumed = sae_trainer(10**6)
    resumed.restore(*first.state())
    assert resumed.schedule.peak == 2e-4 / (64 / 2**14) ** 0.5
    assert resumed.schedule.warmup_tokens == 1_000_000
