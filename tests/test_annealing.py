"""Sparsity schedules: how many latents are active after how many tokens, and what a snapshot in between says."""

from __future__ import annotations

import pytest
import torch

from tests.small_saes import NOBODY, UNSCALED, dense_loss, learn, make, rows_of, sae_trainer_of, settings_of, train_sae
from trainer.kernels.select import positive
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings

ANNEALED = {"anneal_tokens": 640, "anneal_from": 16}
"""Ten batches of 64; the small TopK has k = 6."""


def test_k_falls_linearly_and_stays() -> None:
    """From 16 to 6 over 640 tokens: 11 in the middle; the statistics' L0 follows."""
    sae_trainer = train_sae(settings_of("topk", **ANNEALED), steps=1)
    ks = []
    for seed in range(14):
        ks.append(sae_trainer.sae.k)  # type: ignore[attr-defined]
        learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed)])

    assert ks == [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 6, 6, 6, 6]


def test_without_anneal_from_it_begins_with_four_times_as_many() -> None:
    assert settings_of("topk", anneal_tokens=100).active_latents(0) == 24  # type: ignore[attr-defined]
    assert settings_of("topk", anneal_tokens=100, k=10).active_latents(0) == 32  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["topk", "topk abs", "topk multi", "topk matryoshka", "batchtopk", "jumprelu"])
def test_what_is_annealed_ends_as_what_is_not(kind: str) -> None:
    """The same gradients after the schedule's end, and others before."""
    plain = train_sae(settings_of(kind), steps=1)
    annealed = train_sae(settings_of(kind, anneal_tokens=640, anneal_from=8), steps=1)
    annealed.sae.parameters = {name: value.clone() for name, value in plain.sae.parameters.items()}
    rows, nobody = rows_of(plain.settings, 64, 7), torch.zeros(32, dtype=torch.bool)
    x, y = plain.inputs_and_targets(rows)
    expected = {name: value.clone() for name, value in plain.sae.gradients(x, y, nobody).of.items()}
    early = {name: value.clone() for name, value in annealed.sae.gradients(x, y, nobody).of.items()}
    annealed.tokens = 640
    late = annealed.sae.gradients(x, y, nobody).of

    assert any(not torch.equal(early[name], value) for name, value in expected.items())
    assert all(torch.equal(late[name], value) for name, value in expected.items())


def test_the_target_of_a_jumprelu_falls() -> None:
    """Halfway between 20 and 5 it is 12.5, and the loss is zero there."""
    settings = settings_of("jumprelu", anneal_tokens=1000, anneal_from=20)
    sae_trainer = sae_trainer_of(settings)
    sae_trainer.tokens = 500
    on = torch.ones(64 * 12 + 32)

    loss, _, _ = sae_trainer.sae._penalty(on, on, 64, 1.0)  # type: ignore[attr-defined]
    assert settings.active_latents(500) == 12.5 and float(loss) == 0.0  # type: ignore[attr-defined]


def test_a_snapshot_on_the_way_has_the_k_of_its_moment() -> None:
    """Its weights were trained with that; the last one has the k that was set."""
    sae_trainer = train_sae(settings_of("topk", **ANNEALED), steps=5)
    assert sae_trainer.sae.export()[0]["k"] == 11
    learn(sae_trainer, [rows_of(sae_trainer.settings, 64, seed) for seed in range(5)])
    assert sae_trainer.sae.export()[0]["k"] == 6


def test_a_resumed_schedule_goes_on() -> None:
    """Half of it before, half after, through the keys of a checkpoint: the same bits as at a stretch."""
    settings = settings_of("batchtopk", **ANNEALED)
    batches = [rows_of(settings, 64, seed) for seed in range(8)]
    straight, first, second = (sae_trainer_of(settings) for _ in range(3))
    for sae_trainer in (straight, first):
        sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)
    learn(straight, batches)
    learn(first, batches[:4])
    state, tensors = first.state()
    second.restore(state, type(tensors).from_keys({key: value.clone() for key, value in tensors.by_key().items()}))
    learn(second, batches[4:])

    ours, theirs = (sae_trainer.state()[1].by_key() for sae_trainer in (second, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# p-annealing


def test_p_falls_after_the_warm_up_of_the_penalty() -> None:
    """1 until then, 0.75 halfway, p_end for good."""
    settings = settings_of("p_anneal", sparsity_warmup_tokens=100)
    ps = [settings.p(tokens) for tokens in (0, 100, 300, 500, 10_000)]  # type: ignore[attr-defined]
    assert ps == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])


@pytest.mark.parametrize("tokens", [0, 200, 400])
def test_gradients_equal_dense_autograd_at_every_p(tokens: int) -> None:
    """To 1e-9 in float64, the factor that keeps the penalty's size held constant."""
    sae, x, y = make("p_anneal")
    sae.tokens = tokens
    ours = sae.gradients(x, y, NOBODY, 0.7)
    parameters = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    loss = dense_loss(sae, parameters, x, y, NOBODY, 0.7)
    loss.backward()

    torch.testing.assert_close(sum(ours.loss.values()), loss.detach(), rtol=1e-9, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(ours.of[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_the_penalty_stays_that_of_l1_and_spares_large_latents() -> None:
    """Its value does not change with p; its slope falls with the size of a latent, which that of L1 does not."""
    slopes, losses = [], []
    for tokens in (0, 400):
        sae, _, _ = make("p_anneal")
        sae.tokens = tokens
        value = torch.tensor([[0.1, 1.0, 4.0]], dtype=torch.float64)
        latents = positive(torch.nn.functional.pad(value, (0, 29)))
        loss, slope, _ = sae._penalty(latents, 1.0)  # type: ignore[attr-defined]
        losses.append(float(loss))
        slopes.append(torch.as_tensor(slope).flatten()[:3].tolist())

    assert losses[0] == pytest.approx(losses[1])
    assert slopes[0] == pytest.approx([slopes[0][0]] * 3)
    assert slopes[1][0] > 2 * slopes[0][0] and slopes[1][2] < 0.5 * slopes[0][2]


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal_from": 16}, "anneal_from = 16 needs anneal_tokens"),
        ({"anneal_from": 6, "anneal_tokens": 9}, "anneal_from = 6 must lie between k = 6 and d_sae = 32"),
        ({"anneal_from": 64, "anneal_tokens": 9}, "anneal_from = 64 must lie between k = 6 and d_sae = 32"),
        (
            {"multi_topk": 0.1, "anneal_tokens": 9, "anneal_from": 9},
            "4 k = 36 latents, more than d_sae = 32; lower anneal_from",
        ),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of("topk", **options)


def test_a_penalty_without_a_target_is_not_annealed() -> None:
    with pytest.raises(ValueError, match="anneal_tokens means nothing for jumprelu with penalty l0; remove"):
        SaeSettings.of(
            name="s", architecture="jumprelu", d_sae=32, penalty="l0", sparsity_weight=1.0, anneal_tokens=100
        )


def test_a_schedule_longer_than_the_run_is_warned_of() -> None:
    table = {"name": "s", "architecture": "topk", "d_sae": 32, "k": 4, "anneal_tokens": 20_000_000}
    run = {"tokens": 12_000_000}
    settings = TrainerSettings.model_validate({"run": run, "model": {"name": "m", "hooks": ["h"]}, "sae": [table]})

    assert [line for line in settings.warnings() if "anneal_tokens = 20_000_000 is longer than run.tokens" in line]
