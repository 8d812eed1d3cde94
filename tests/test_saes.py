"""Gradients against dense autograd, identities, and the bugs other trainers shipped (numbers: peers.md §6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.kernels import reference
from trainer.kernels.sparse import Entries, multiply, positive_entries, sample, topk, topk_entries, transpose
from trainer.saes.base import Sae, geometric_median
from trainer.saes.inference import check, export
from trainer.saes.jumprelu import JumpReLU
from trainer.saes.topk import TopK
from trainer.settings import SaeSettings
from trainer.snapshot import SnapshotError, publish, read_sae

D_IN, D_SAE, BATCH = 12, 32, 20
NOBODY = torch.zeros(D_SAE, dtype=torch.bool)


def some_dead(count: int = 6) -> Tensor:
    dead = NOBODY.clone()
    dead[torch.tensor([1, 5, 9, 20, 21, 25][:count], dtype=torch.long)] = True
    return dead


def make(architecture: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Sae, Tensor]:
    """A small SAE away from its initial point, and a batch."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "topk": {"k": 6, "k_aux": 4},
        "jumprelu": {"target_l0": 5.0, "bandwidth": 0.8, "initial_threshold": 0.3, "pre_act_weight": 0.01},
    }[architecture]
    settings = SaeSettings(name="s", architecture=architecture, d_sae=D_SAE, **(defaults | options))
    x = torch.randn(BATCH, D_IN, dtype=torch.float64) + 0.3
    sae = {"topk": TopK, "jumprelu": JumpReLU}[architecture](settings, D_IN)
    sae.initialise(x.float(), torch.Generator().manual_seed(1))
    sae.parameters = {
        name: (value.double() + 0.05 * torch.randn_like(value.double())).to(dtype)
        for name, value in sae.parameters.items()
    }
    sae.matmul_dtype = dtype
    return sae, x.to(dtype)


def dense_loss(sae: Sae, params: dict[str, Tensor], x: Tensor, dead: Tensor) -> Tensor:
    s = sae.settings
    if isinstance(sae, TopK):
        assert s.k is not None and s.k_aux is not None
        return reference.topk_loss(params, x, s.k, sae.variance, dead, s.k_aux, s.aux_weight)
    assert s.target_l0 is not None
    return reference.jumprelu_loss(
        params, x, sae.variance, s.bandwidth, s.target_l0, s.l0_weight, dead, s.pre_act_weight
    )


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize(
    "dead", [NOBODY, some_dead(1), some_dead(3), some_dead()], ids=lambda d: f"{int(d.sum())} dead"
)
def test_gradients_equal_dense_autograd(architecture: str, dead: Tensor) -> None:
    """Every parameter's gradient, and the loss, to 1e-9 in float64, with 0, 1, fewer than and more than k_aux dead."""
    sae, x = make(architecture)
    ours = sae.gradients(x, dead)
    params = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    loss = dense_loss(sae, params, x, dead)
    loss.backward()

    torch.testing.assert_close(sum(ours.loss.values()), loss.detach(), rtol=1e-9, atol=0)
    for name, param in params.items():
        assert param.grad is not None
        torch.testing.assert_close(ours.of[name], param.grad, rtol=1e-9, atol=1e-12)


def test_bug_1_a_zero_winner_has_not_fired() -> None:
    """With fewer positive pre-activations than k, the rest of the k entries are zeros and count for nothing."""
    entries = topk_entries(torch.tensor([[3.0, -1.0, -2.0, 1.0]]), 3)

    assert int((entries.value > 0).sum()) == 2


def test_bug_2_winners_clipped_to_zero_get_no_gradient() -> None:
    """k larger than the number of positive pre-activations: as autograd says, through the ReLU."""
    sae, x = make("topk", k=30)
    params = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    dense_loss(sae, params, x, NOBODY).backward()

    torch.testing.assert_close(sae.gradients(x, NOBODY).of["W_enc"], params["W_enc"].grad, rtol=1e-9, atol=1e-12)


def test_bug_3_auxk_reaches_the_encoder() -> None:
    """A dead latent that is not among the k gets an encoder gradient from AuxK alone."""
    sae, x = make("topk", k=1)
    dead = NOBODY.clone()
    dead[7] = True
    sae.parameters["b_enc"][7] = -1e-3
    without, with_it = sae.gradients(x, NOBODY).of["W_enc"][7], sae.gradients(x, dead).of["W_enc"][7]

    assert float((with_it - without).norm()) > 0


def test_bug_6_the_aux_residual_is_held_constant() -> None:
    """AuxK changes nothing for latents that are not dead: its target does not pull on the reconstruction."""
    sae, x = make("topk")
    dead = some_dead()
    plain, helped = sae.gradients(x, NOBODY), sae.gradients(x, dead)

    torch.testing.assert_close(helped.of["W_dec"][~dead], plain.of["W_dec"][~dead], rtol=1e-12, atol=0)


def test_bug_7_the_aux_reconstruction_has_no_bias() -> None:
    """Moving b_dec and x together moves neither residual nor aux reconstruction, so the aux loss stays."""
    sae, x = make("topk")
    before = sae.gradients(x, some_dead()).loss["auxiliary"]
    sae.parameters["b_dec"] += 3.0
    after = sae.gradients(x + 3.0, some_dead()).loss["auxiliary"]

    torch.testing.assert_close(after, before, rtol=1e-9, atol=0)


def test_bug_14_the_threshold_gradient_is_that_of_the_smoothed_loss() -> None:
    """Where x varies smoothly, the mean straight-through gradient of θ follows the finite difference of the loss."""
    torch.manual_seed(0)
    z = torch.rand(400_000, 1, dtype=torch.float64) * 2
    target = z * (z > 0.4)

    def loss(theta: float) -> float:
        return float((z * (z > theta) - target).square().mean())

    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    (reference.Jump.apply(z, theta, 0.1) - target).square().mean().backward()
    finite = (loss(1.05) - loss(0.95)) / 0.1
    assert theta.grad is not None
    # Half of the window lies on either side of the jump, where the residual differs: 2θ·(θ − θ/2) becomes θ².
    assert finite == pytest.approx(float(theta.grad), rel=0.05)


def test_bug_15b_a_target_l0_is_reached_whatever_its_weight() -> None:
    """The pull on L0 changes sign at the target: too many active latents are pushed down, too few are pulled up."""
    for target, sign in ((1.0, -1), (30.0, 1)):
        sae, x = make("jumprelu", target_l0=target, bandwidth=3.0)
        plain = make("jumprelu", target_l0=target, bandwidth=3.0, l0_weight=0.0)[0].gradients(x, NOBODY).of["b_enc"]
        pulled = sae.gradients(x, NOBODY).of["b_enc"] - plain

        assert sign == -int(torch.sign(pulled.sum()))


def test_bug_37_a_row_is_encoded_the_same_in_any_batch() -> None:
    """Latents of a row do not depend on its neighbours."""
    for architecture in ("topk", "jumprelu"):
        sae, x = make(architecture)
        alone, together = sae.gradients(x[:1], NOBODY).fired.dense(), sae.gradients(x, NOBODY).fired.dense()[:1]

        torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)


def test_bug_38_the_seed_decides_the_weights() -> None:
    """Same seed, same weights; another seed, others."""
    sae, x = make("topk")

    def weights(seed: int) -> Tensor:
        sae.parameters["W_dec"] = sae.parameters["W_dec"].float()
        sae.initialise(x.float(), torch.Generator().manual_seed(seed))
        return sae.parameters["W_dec"].clone()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_permuting_latents_permutes_everything(architecture: str) -> None:
    """No latent is special: the gradients of a permuted SAE are the permuted gradients."""
    sae, x = make(architecture)
    dead = some_dead()
    plain = sae.gradients(x, dead).of
    order = torch.randperm(D_SAE)
    sae.parameters = {name: value[order] if name != "b_dec" else value for name, value in sae.parameters.items()}
    permuted = sae.gradients(x, dead[order]).of

    for name in plain:
        expected = plain[name][order] if name != "b_dec" else plain[name]
        torch.testing.assert_close(permuted[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_snapshot_takes_raw_activations(architecture: str, tmp_path: Any) -> None:
    """Scale folded into biases and threshold, unit rows in float32, and the snapshot passes its own self-test."""
    sae, x = make(architecture, torch.float32)
    sae.after_step()
    scale = 0.37
    raw = x / scale
    exported = export(sae, scale, torch.full((D_SAE,), 0.1), raw, {"hook_name": "h"}, {})
    folder = publish(tmp_path, 1000, [exported], {"id": "r"}, check) / "s"
    _, weights = read_sae(folder)

    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"], axis=1), 1, atol=1e-6)
    fired = sae.gradients(x, NOBODY)
    from trainer.saes.inference import load_sae

    published = load_sae(folder)
    torch.testing.assert_close(published.encode(raw) * scale, fired.fired.dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(published.decode(published.encode(raw)) * scale, fired.x_hat, rtol=1e-4, atol=1e-5)


def test_bug_13_a_forgotten_threshold_is_caught_before_publishing(tmp_path: Any) -> None:
    """The self-test on disk fails when weights and expected latents do not belong together; nothing appears."""
    sae, x = make("jumprelu", torch.float32)
    sae.after_step()
    exported = export(sae, 0.5, torch.full((D_SAE,), 0.1), x / 0.5, {}, {})
    exported.weights["threshold"] = exported.weights["threshold"] * 0.5

    with pytest.raises(SnapshotError, match="self-test"):
        publish(tmp_path, 1000, [exported], {}, check)
    assert not (tmp_path / "snapshots" / "LATEST").exists()
    assert [path for path in (tmp_path / "snapshots").iterdir()] == []


def test_two_stage_topk_is_exact() -> None:
    """The grouped search finds the same values as a plain one, with duplicates and negatives among them."""
    torch.manual_seed(0)
    for rows, n, k in ((50, 4096, 32), (7, 1024, 1), (3, 512, 15)):
        values = torch.randn(rows, n).mul_(4).round_().div_(4)
        value, index = topk(values, k)

        torch.testing.assert_close(value.sort(1).values, values.topk(k).values.sort(1).values)
        torch.testing.assert_close(values.gather(1, index), value)
        assert all(k == len(set(row.tolist())) for row in index)


def test_sparse_products_equal_dense_ones() -> None:
    """multiply, sample, transpose: each against its dense formula, with empty rows and columns."""
    torch.manual_seed(0)
    pre_acts = torch.randn(9, 16, dtype=torch.float64)
    pre_acts[4] = -5.0
    entries = positive_entries(pre_acts)
    dense, W, X = entries.dense(), torch.randn(16, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    by_column = transpose(entries)

    torch.testing.assert_close(dense, pre_acts.relu())
    torch.testing.assert_close(multiply(entries, W), dense @ W)
    torch.testing.assert_close(sample(entries, X, W), (X @ W.T)[entries.row(), entries.column])
    torch.testing.assert_close(by_column.multiply(entries.value, X), dense.T @ X)
    torch.testing.assert_close(by_column.sums(entries.value), dense.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positive_entries_are_those_above_zero(dtype: torch.dtype) -> None:
    """Zero, minus zero, negatives and the smallest positive number, in every format the encoder product has."""
    values = torch.tensor([[0.0, -0.0, 1.0], [-1.0, 1e-38, -1e-38]], dtype=dtype)
    entries = positive_entries(values)

    assert torch.stack([entries.row(), entries.column], 1).tolist() == [[0, 2], [1, 1]]


def test_sparse_products_repeat_bit_for_bit() -> None:
    """Sums have a fixed order: the same batch gives the same bits."""
    sae, x = make("topk", torch.float32)
    first, second = sae.gradients(x, some_dead()).of, sae.gradients(x, some_dead()).of

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_entries_at_all() -> None:
    """A batch on which nothing fires is a batch like others."""
    empty = Entries(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 8)

    assert tuple(multiply(empty, torch.randn(8, 5)).shape) == (3, 5)
    assert float(transpose(empty).sums(empty.value).sum()) == 0


def test_the_geometric_median_shrugs_off_outliers() -> None:
    """One row a thousand times too large moves the mean, hardly the median."""
    torch.manual_seed(0)
    x = torch.randn(1000, 4) + 2.0
    x[0] = 1e4

    torch.testing.assert_close(geometric_median(x), torch.full((4,), 2.0), atol=0.2, rtol=0)
