"""The gradients: against dense autograd, against finite differences, and against numbers worked out on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_saes import (
    BATCH,
    CROSSCODER,
    D_SAE,
    FAMILY,
    JUMPRELU,
    NOBODY,
    dead_latents,
    dense_loss,
    make,
    settings_of,
)
from tests.small_saes import build as build_sae
from trainer.kernels.dense import Dense
from trainer.kernels.sparse import Entries
from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.settings import SaeSettings

PENALISED: dict[str, Any] = JUMPRELU | {"target_l0": None, "sparsity_weight": 0.5}
CASES = FAMILY | {
    "topk k=1": {"architecture": "topk", "k": 1},
    "topk with more k than positive": {"architecture": "topk", "k": 30, "k_aux": 4},
    "topk multi matryoshka": {"architecture": "topk", "k": 5, "multi_topk": 0.125, "matryoshka": [4, 16, 32]},
    "jumprelu encoder, log": JUMPRELU | {"threshold": "log"},
    "jumprelu threshold, linear": JUMPRELU | {"straight_through": "threshold"},
    "jumprelu l0": PENALISED | {"penalty": "l0"},
    "jumprelu tanh": PENALISED | {"penalty": "tanh"},
    "jumprelu tanh, all lifted": PENALISED | {"penalty": "tanh", "pre_act_on": "all", "threshold": "log"},
    "jumprelu l0, all lifted, matryoshka": PENALISED | {"penalty": "l0", "pre_act_on": "all", "matryoshka": [8, 32]},
    "jumprelu auxk": {"architecture": "jumprelu", "target_l0": 5.0, "bandwidth": 0.8, "revive": "auxk", "k_aux": 4},
    "relu l1 auxk": FAMILY["relu l1"] | {"revive": "auxk", "k_aux": 4},
    "relu crosscoder tanh": FAMILY["relu crosscoder"] | {"penalty": "tanh"},
    "gated auxk": FAMILY["gated"] | {"revive": "auxk", "k_aux": 4},
    "gated crosscoder": FAMILY["gated"] | CROSSCODER,
    "repair scale": FAMILY["repair"] | {"train": "scale"},
    "repair decoder": FAMILY["repair"] | {"train": "decoder"},
}


def case(name: str) -> SaeSettings:
    options = {key: value for key, value in CASES[name].items() if value is not None}
    return SaeSettings.of(name="s", d_sae=D_SAE, **options)


# Dense autograd


@pytest.mark.parametrize("number_dead", [0, 1, 3, 6])
@pytest.mark.parametrize(("kind", "dense_above"), [(Entries, 2.0), (Dense, 0.0)], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_dense_autograd(name: str, kind: type, dense_above: float, number_dead: int) -> None:
    """Loss and every gradient to 1e-9 in float64, in both representations, with 0, 1, under and over k_aux dead."""
    sae, x, y = build_sae(case(name))
    sae.dense_above = dense_above
    dead = dead_latents(number_dead)
    ours = sae.gradients(x, y, dead, 0.7)
    parameters = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    loss = dense_loss(sae, parameters, x, y, dead, 0.7)
    loss.backward()

    assert isinstance(ours.fired, kind)
    assert ours.of.keys() == parameters.keys()
    torch.testing.assert_close(sum(ours.loss.values()), loss.detach(), rtol=1e-9, atol=0)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(ours.of[name], parameter.grad, rtol=1e-9, atol=1e-9 * float(parameter.grad.norm()))


def test_both_representations_give_the_same() -> None:
    """What is sparse or dense is a matter of speed."""
    for kind in FAMILY:
        results = []
        for dense_above in (2.0, 0.0):
            sae, x, y = make(kind)
            sae.dense_above = dense_above
            results.append(sae.gradients(x, y, dead_latents()))

        torch.testing.assert_close(results[0].y_hat, results[1].y_hat, rtol=1e-12, atol=1e-12)
        assert torch.equal(results[0].fired.firings(), results[1].fired.firings())
        for name, value in results[0].of.items():
            torch.testing.assert_close(results[1].of[name], value, rtol=1e-9, atol=1e-12)


# Finite differences: nothing but the loss itself


def total(sae: Sae, x: Tensor, y: Tensor, dead: Tensor) -> float:
    return float(sum(sae.gradients(x, y, dead, 0.7).loss.values()))


def slope(sae: Sae, x: Tensor, y: Tensor, dead: Tensor, name: str, direction: Tensor, h: float = 1e-6) -> float:
    """The central difference of the loss along `direction`."""
    values = []
    for sign in (1, -1):
        sae.parameters[name] += sign * h * direction
        values.append(total(sae, x, y, dead))
        sae.parameters[name] -= sign * h * direction
    return (values[0] - values[1]) / (2 * h)


NARROW: dict[str, Any] = {"bandwidth": 1e-12}
"""A kernel that no entry falls into leaves the derivative of the function itself."""
SMOOTH = {name: FAMILY[name] | (NARROW if name.startswith("jumprelu") else {}) for name in FAMILY if name != "gated"}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_equal_finite_differences(name: str) -> None:
    """Where nothing is held constant, the loss moves by what the gradient says; AuxK is left out for that."""
    revived = dead_latents() if name.startswith("jumprelu") else NOBODY
    sae, x, y = build_sae(SaeSettings.of(name="s", d_sae=D_SAE, **SMOOTH[name]))
    gradients = sae.gradients(x, y, revived, 0.7).of
    for parameter, value in sae.parameters.items():
        direction = torch.randn_like(value)
        expected = float((gradients[parameter] * direction).sum())

        assert slope(sae, x, y, revived, parameter, direction) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("parameter", ["W_enc", "b_gate", "b_mag", "r_mag"])
def test_gated_gradients_equal_finite_differences(parameter: str) -> None:
    """Of what is not held constant anywhere: all but the decoder."""
    sae, x, y = make("gated")
    direction = torch.randn_like(sae.parameters[parameter])
    expected = float((sae.gradients(x, y, NOBODY, 0.7).of[parameter] * direction).sum())

    assert slope(sae, x, y, NOBODY, parameter, direction) == pytest.approx(expected, rel=1e-5)


def test_the_frozen_decoder_of_gated_gets_nothing() -> None:
    """W_dec's gradient is that of the first term alone: a finite difference of it, not of the sum."""
    sae, x, y = make("gated")
    direction, h = torch.randn_like(sae.W_dec), 1e-6
    expected = float((sae.gradients(x, y, NOBODY).of["W_dec"] * direction).sum())
    losses = []
    for sign in (1, -1):
        sae.parameters["W_dec"] += sign * h * direction
        losses.append(float(sae.gradients(x, y, NOBODY).loss["reconstruction"]))
        sae.parameters["W_dec"] -= sign * h * direction

    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)
    assert slope(sae, x, y, NOBODY, "W_dec", direction) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", ["topk", "topk multi", "topk matryoshka", "batchtopk"])
def test_auxk_gradients_of_silent_latents_equal_finite_differences(kind: str) -> None:
    """Dead latents that are silent do not move the residual: that it is held constant does not matter for them."""
    sae, x, y = make(kind, aux_weight=1.0)
    dead = dead_latents()
    sae.parameters["W_enc"][dead] *= 1e-3
    sae.parameters["b_enc"][dead] = 1e-3
    gradients = sae.gradients(x, y, dead, 0.7)

    assert not gradients.fired.firings()[dead].any()
    for parameter in ("W_enc", "W_dec"):
        direction = torch.randn_like(sae.parameters[parameter]) * dead[:, None]
        expected = float((gradients.of[parameter] * direction).sum())
        assert slope(sae, x, y, dead, parameter, direction, 1e-7) == pytest.approx(expected, rel=1e-4)
        assert expected != 0


# Worked out on paper: x = (3, 1) unless said otherwise, W_enc = W_dec = 1 and biases zero unless given, variance 1

ONE: list[list[float]] = [[1.0, 0.0], [0.0, 1.0]]
PAPER: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # y_hat = 3 (0.6, 0.8), error (1.2, −1.4), ∂y_hat = (−2.4, 2.8), ∂z_0 = −1.44 + 2.24 = 0.8
    "topk": (
        {"architecture": "topk", "k": 1},
        {"W_dec": [[0.6, 0.8], [0, 1]]},
        {
            "loss": 1.44 + 1.96,
            "W_dec": [[-7.2, 8.4], [0, 0]],
            "W_enc": [[2.4, 0.8], [0, 0]],
            "b_enc": [0.8, 0],
            "b_dec": [-2.4 - 0.8, 2.8],
        },
    ),
    # The larger magnitude is negative and keeps its sign: x = (1, −2), y_hat = (0, −2), error (1, 0)
    "topk abs": (
        {"architecture": "topk", "k": 1, "abs": True},
        {"x": [[1, -2]]},
        {"loss": 1, "W_dec": [[0, 0], [4, 0]], "W_enc": [[0, 0], [0, 0]], "b_enc": [0, 0], "b_dec": [-2, 0]},
    ),
    # Both largest of the batch are in row 0, which is exact; row 1 goes without: error (1, 0.5), halved by the mean
    "batchtopk": (
        {"architecture": "batchtopk", "k": 1},
        {"x": [[3, 2.5], [1, 0.5]]},
        {
            "loss": (1 + 0.25) / 2,
            "W_dec": [[0, 0], [0, 0]],
            "W_enc": [[0, 0], [0, 0]],
            "b_enc": [0, 0],
            "b_dec": [-1, -0.5],
        },
    ),
    # Level 1: error (1.2, −1.4); level 2: y_hat = (1.8, 3.4), error (1.2, −2.4); each level weighs a half
    "matryoshka": (
        {"architecture": "topk", "k": 2, "matryoshka": [1, 2]},
        {"W_dec": [[0.6, 0.8], [0, 1]]},
        {
            "loss": (1.44 + 1.96 + 1.44 + 5.76) / 2,
            "W_dec": [[3 * -2.4, 3 * 3.8], [-1.2, 2.4]],
            "b_enc": [-2.4 * 0.6 + 3.8 * 0.8, 2.4],
            "b_dec": [-2.4 - 1.6, 3.8 - 2.4],
        },
    ),
    # L(k = 1) as in topk; L(4 k = 4) of 4 latents, two of them clipped at zero: y_hat = (1.8, 3.4), error (1.2, −2.4)
    "multi-topk": (
        {"architecture": "topk", "k": 1, "multi_topk": 0.125, "d_sae": 4},
        {
            "W_enc": [[1, 0], [0, 1], [-1, 0], [0, -1]],
            "W_dec": [[0.6, 0.8], [0, 1], [1, 0], [0, 1]],
            "b_enc": [0, 0, 0, 0],
        },
        {
            "loss": 3.4 + 7.2 / 8,
            "W_dec": [[-7.2 - 0.9, 8.4 + 14.4 / 8], [-2.4 / 8, 4.8 / 8], [0, 0], [0, 0]],
            "b_enc": [0.8 + (-1.44 + 3.84) / 8, 4.8 / 8, 0, 0],
        },
    ),
    # x = (1, 0.3), θ = 0.5, ε = 0.6: z_0 is beyond the kernel; z_1 is off, inside, K/ε = 1/0.6, and with the decoder
    # row (0.6, 0.8) would change the loss at ∂latent_1 = −0.6 · 0.8 = −0.48. L0 = 1 of 2: 0.1 · 0.25, ∂H = −0.05.
    "jumprelu": (
        {"architecture": "jumprelu", "target_l0": 2.0, "l0_weight": 0.1, "bandwidth": 0.6},
        {"x": [[1, 0.3]], "W_dec": [[1, 0], [0.6, 0.8]], "threshold": [0.5, 0.5]},
        {
            "loss": 0.09 + 0.025,
            "threshold": [0, 0.29 / 0.6],
            "b_enc": [0, -0.29 / 0.6],
            "W_enc": [[0, 0], [-0.29 / 0.6, -0.3 * 0.29 / 0.6]],
            "W_dec": [[0, -0.6], [0, 0]],
            "b_dec": [0, -0.6 + 0.29 / 0.6],
        },
    ),
    "jumprelu, threshold only": (
        {
            "architecture": "jumprelu",
            "target_l0": 2.0,
            "l0_weight": 0.1,
            "bandwidth": 0.6,
            "straight_through": "threshold",
        },
        {"x": [[1, 0.3]], "W_dec": [[1, 0], [0.6, 0.8]], "threshold": [0.5, 0.5]},
        {"threshold": [0, 0.29 / 0.6], "b_enc": [0, 0], "W_enc": [[0, 0], [0, 0]], "b_dec": [0, -0.6]},
    ),
    # ∂/∂log θ = θ ∂/∂θ, once
    "jumprelu, log threshold": (
        {"architecture": "jumprelu", "target_l0": 2.0, "l0_weight": 0.1, "bandwidth": 0.6, "threshold": "log"},
        {"x": [[1, 0.3]], "W_dec": [[1, 0], [0.6, 0.8]], "log_threshold": [math.log(0.5), math.log(0.5)]},
        {"log_threshold": [0, 0.5 * 0.29 / 0.6], "b_enc": [0, -0.29 / 0.6]},
    ),
    # w · L0 = 0.2; ∂H = 0.2: at latent 1 (0.5 · −0.48 + 0.2) / 0.6
    "jumprelu, l0": (
        {"architecture": "jumprelu", "penalty": "l0", "sparsity_weight": 0.2, "bandwidth": 0.6},
        {"x": [[1, 0.3]], "W_dec": [[1, 0], [0.6, 0.8]], "threshold": [0.5, 0.5]},
        {"loss": 0.09 + 0.2, "threshold": [0, 0.04 / 0.6], "b_enc": [0, -0.04 / 0.6]},
    ),
    # Latent 1 is dead: 0.01 · (0.5 − 0.3) lifts it, z up and θ down, on top of the above
    "jumprelu, pre_act": (
        {"architecture": "jumprelu", "target_l0": 2.0, "l0_weight": 0.1, "bandwidth": 0.6, "pre_act_weight": 0.01},
        {"x": [[1, 0.3]], "W_dec": [[1, 0], [0.6, 0.8]], "threshold": [0.5, 0.5], "dead": [1]},
        {"loss": 0.115 + 0.002, "threshold": [0, 0.29 / 0.6 + 0.01], "b_enc": [0, -0.29 / 0.6 - 0.01]},
    ),
    # y_hat = (1.8, 3.4), error (1.2, −2.4); 0.1 · (3 + 1); ∂latents = (−1.44 + 3.84, 4.8) + 0.1
    "relu l1": (
        {"architecture": "relu", "penalty": "l1", "sparsity_weight": 0.1},
        {"W_dec": [[0.6, 0.8], [0, 1]]},
        {"loss": 7.2 + 0.4, "b_enc": [2.5, 4.9], "W_dec": [[-7.2, 14.4], [-2.4, 4.8]], "b_dec": [-4.9, -0.1]},
    ),
    # Decoder norms 0.5 and 1: y_hat = (0.9, 2.2), error (2.1, −1.2); 0.1 · (3 · 0.5 + 1)
    "relu l1_norm": (
        {"architecture": "relu", "sparsity_weight": 0.1},
        {"W_dec": [[0.3, 0.4], [0, 1]]},
        {
            "loss": 4.41 + 1.44 + 0.25,
            "b_enc": [-1.26 + 0.96 + 0.05, 2.4 + 0.1],
            "W_dec": [[-12.6 + 0.18, 7.2 + 0.24], [-4.2, 2.4 + 0.1]],
        },
    ),
    "relu tanh": (
        {"architecture": "relu", "penalty": "tanh", "sparsity_weight": 0.1, "tanh_scale": 2.0},
        {"W_dec": [[0.3, 0.4], [0, 1]]},
        {
            "loss": 5.85 + 0.1 * (math.tanh(3) + math.tanh(2)),
            "b_enc": [-0.3 + 0.1 / math.cosh(3) ** 2, 2.4 + 0.2 / math.cosh(2) ** 2],
        },
    ),
    # One latent that writes to two hooks of one number each: it pays |3| + |4| = 7, not 5. x = (1, 0), error (−2, −4)
    "crosscoder": (
        {"architecture": "relu", "sparsity_weight": 0.1, "hooks": ["a", "b"]},
        {"x": [[1, 0]], "W_dec": [[3, 4], [1, 1]], "widths": (1, 1)},
        {"loss": 20 + 0.7, "b_enc": [12 + 32 + 0.7, 0], "W_dec": [[4.1, 8.1], [0, 0]]},
    ),
    # M = ((0.6, 0.8), (0, 1)), x = (1, 1): latents (1.4, 1), error (0.16, −1.12), ∂latents = (1.6, 2.24) + 0.1
    "tied": (
        {"architecture": "tied", "sparsity_weight": 0.1},
        {"x": [[1, 1]], "W_dec": [[0.6, 0.8], [0, 1]]},
        {
            "loss": 0.0256 + 1.2544 + 0.24,
            "W_dec": [[1.7 - 0.448, 1.7 + 3.136], [2.34 - 0.32, 2.34 + 2.24]],
            "b_enc": [1.7, 2.34],
        },
    ),
    # x = (3, 2): π_gate = (2, 1), π_mag = (3 + 0.5, 2 · 2 − 1); error (−0.5, −1); of the frozen copy (1, 1)
    "gated": (
        {"architecture": "gated", "sparsity_weight": 0.1},
        {"x": [[3, 2]], "b_gate": [-1, -1], "b_mag": [0.5, -1], "r_mag": [0, math.log(2)]},
        {
            "loss": 1.25 + 0.3 + 2,
            "b_mag": [1, 2],
            "b_gate": [-1.9, -1.9],
            "r_mag": [1 * 3, 2 * 2 * 2],
            "W_enc": [[3 * -0.9, 2 * -0.9], [3 * 2.1, 2 * 2.1]],
            "W_dec": [[3.5, 7], [3, 6]],
            "b_dec": [1 + 0.9, 2 - 2.1],
        },
    ),
    # latents = (2 · 3, 0.5 · 1): error (−3, 0.5)
    "repair": (
        {"architecture": "repair", "train": "all", "start_from": "somewhere"},
        {"scale": [2, 0.5]},
        {"loss": 9.25, "scale": [18, -1], "b_enc": [12, -0.5], "W_dec": [[36, -6], [3, -0.5]], "b_dec": [6, -1]},
    ),
    # y_hat = 3 · 2 + (3 − 1) = 8 where y = 7
    "skip transcoder": (
        {"architecture": "topk", "k": 1, "hook": "a", "target": "b", "skip": True},
        {"y": [[7]], "W_dec": [[2], [1]], "W_skip": [[1, -1]], "b_dec": [0]},
        {"loss": 1, "W_enc": [[12, 4], [0, 0]], "W_dec": [[6], [0]], "W_skip": [[6, 2]], "b_dec": [2]},
    ),
    # Two rows, latent 1 dead and never among the k = 1. Errors (0, 1), (0, 0.5): spread 0.125. It says 2 and 1 where
    # 1 and 0.5 are left: (1 + 0.25) / 32 / 0.125. ∂e_hat = 2 / 32 / 0.125 · (1, 0.5) = (0.5, 0.25)
    "auxk": (
        {"architecture": "topk", "k": 1},
        {"x": [[3, 1], [2, 0.5]], "W_enc": [[1, 0], [0, 2]], "dead": [1]},
        {
            "loss": 1.25 / 2 + 0.3125,
            "W_dec": [[0, -3 - 1], [0, 2 * 0.5 + 1 * 0.25]],
            "W_enc": [[0, 0], [0.5 * 3 + 0.25 * 2, 0.5 * 1 + 0.25 * 0.5]],
            "b_enc": [0, 0.75],
            "b_dec": [0, -1.5 - 2 * 0.75],
        },
    ),
}


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("name", PAPER)
def test_gradients_equal_those_on_paper(name: str) -> None:
    """Two latents, two numbers, one row: every architecture and loss term, from its equations by hand."""
    options, parameters, expected = PAPER[name]
    x = tensor(parameters.get("x", [[3, 1]]))
    y = tensor(parameters["y"]) if "y" in parameters else x
    settings = SaeSettings.of(name="s", **({"d_sae": 2} | options))
    sae = registry.get(settings.architecture)(
        settings, parameters.get("widths", (2,)), y.shape[1] if settings.target else None
    )
    values = {"W_enc": ONE, "W_dec": ONE, "b_enc": [0, 0], "b_dec": [0, 0]} | parameters
    sae.parameters = {name: tensor(values[name]) for name in sae.parameters}
    sae.matmul_dtype = torch.float64
    dead = torch.zeros(settings.d_sae, dtype=torch.bool)
    dead[parameters.get("dead", [])] = True
    gradients = sae.gradients(x, y, dead)

    for parameter, value in expected.items():
        ours = sum(gradients.loss.values()) if parameter == "loss" else gradients.of[parameter]
        torch.testing.assert_close(ours, tensor(value), rtol=1e-9, atol=1e-12)


# Straight through the jump


def test_the_kernel_has_the_width_and_the_sides_of_its_definition() -> None:
    """θ = 1, ε = 0.4: only |z − θ| < 0.2 moves the threshold, on either side, by θ/ε; z itself passes above θ."""
    settings = SaeSettings.of(
        name="s", d_sae=1, architecture="jumprelu", penalty="l0", sparsity_weight=0.0, bandwidth=0.4
    )
    sae = registry.get("jumprelu")(settings, (1,))
    parameters = {"W_enc": [[1.0]], "W_dec": [[1.0]], "b_enc": [0.0], "b_dec": [0.0], "threshold": [1.0]}
    sae.parameters = {name: tensor(value) for name, value in parameters.items()}
    sae.matmul_dtype = torch.float64
    nobody = torch.zeros(1, dtype=torch.bool)
    moved_thresholds = {}
    for z in (0.79, 0.81, 0.99, 1.01, 1.19, 1.21):
        y = tensor([[0.0]])  # ∂L/∂latent is then 2 · latent, or 2 · 0 while it is off
        of = sae.gradients(tensor([[z]]), y + 1, nobody).of
        slope_here = 2 * (z - 1) if z > 1 else -2.0
        moved_thresholds[z] = float(of["threshold"]) / slope_here
        through_z = float(of["b_enc"]) / slope_here
        inside = 0.8 < z < 1.2
        assert through_z == pytest.approx((z > 1) + inside * 2.5)

    assert moved_thresholds == pytest.approx({0.79: 0, 0.81: -2.5, 0.99: -2.5, 1.01: -2.5, 1.19: -2.5, 1.21: 0})


def test_bug_14_the_threshold_gradient_is_that_of_the_smoothed_loss() -> None:
    """Where z varies smoothly, the mean gradient of θ follows the finite difference of the mean loss."""
    torch.manual_seed(0)
    settings = SaeSettings.of(
        name="s", d_sae=1, architecture="jumprelu", penalty="l0", sparsity_weight=0.3, bandwidth=0.1
    )
    sae = registry.get("jumprelu")(settings, (1,))
    parameters = {"W_enc": [[1.0]], "W_dec": [[1.0]], "b_enc": [0.0], "b_dec": [0.0], "threshold": [1.0]}
    sae.parameters = {name: tensor(value) for name, value in parameters.items()}
    sae.matmul_dtype = torch.float64
    z = torch.rand(400_000, 1, dtype=torch.float64) * 2
    y = z * (z > 0.4)
    nobody = torch.zeros(1, dtype=torch.bool)

    def loss(theta: float) -> float:
        sae.parameters["threshold"].fill_(theta)
        return float(sum(sae.gradients(z, y, nobody).loss.values()))

    finite = (loss(1.05) - loss(0.95)) / 0.1
    sae.parameters["threshold"].fill_(1.0)
    # Density 1/2 at θ: dropping z = θ costs θ² of error and saves 0.3 of penalty.
    assert finite == pytest.approx(0.5 * (1.0 - 0.3), rel=0.02)
    assert float(sae.gradients(z, y, nobody).of["threshold"]) == pytest.approx(finite, rel=0.05)


# What must reach the encoder


def test_bug_2_winners_clipped_to_zero_get_no_gradient() -> None:
    """k beyond the number of positive pre-activations: a latent that is at or below zero on every row gets nothing."""
    sae, x, y = make("topk", k=30)
    sae.parameters["b_enc"][3] = -100.0
    gradients = sae.gradients(x, y, NOBODY)

    assert not gradients.of["W_enc"][3].any()
    assert not gradients.of["W_dec"][3].any()


@pytest.mark.parametrize("name", ["topk", "batchtopk", "gated auxk", "relu l1 auxk", "jumprelu auxk"])
def test_bug_3_auxk_reaches_the_encoder(name: str) -> None:
    """A dead latent gets a gradient from AuxK in its encoder row and bias too, not only in the decoder."""
    sae, x, y = build_sae(case(name))
    dead = NOBODY.clone()
    dead[7] = True
    plain, helped = sae.gradients(x, y, NOBODY).of, sae.gradients(x, y, dead).of

    for parameter in ("W_enc", "W_dec", sae.encoder_bias):
        assert (helped[parameter] - plain[parameter])[7].any()


def test_bug_3_multi_topk_reaches_the_encoder() -> None:
    """A latent that is chosen among 4 k only, never among k, gets a gradient everywhere."""
    sae, x, y = make("topk multi")
    sae.parameters["W_enc"][7] *= 0.05
    sae.parameters["b_enc"][7] = 0.3
    gradients = sae.gradients(x, y, NOBODY)

    assert gradients.fired.firings()[7] == 0
    for parameter in ("W_enc", "W_dec", "b_enc"):
        assert gradients.of[parameter][7].any()


def test_bug_4_multi_topk_does_not_count_as_firing() -> None:
    """Reconstruction and firing statistics are those of k latents, with the second loss or without."""
    with_it, x, y = make("topk multi")
    without, _, _ = make("topk multi", multi_topk=0.0)
    ours, plain = with_it.gradients(x, y, NOBODY), without.gradients(x, y, NOBODY)

    assert int((ours.fired.dense() != 0).sum(1).max()) <= 5
    assert torch.equal(ours.fired.firings(), plain.fired.firings())
    assert torch.equal(ours.y_hat, plain.y_hat)


def test_bug_6_the_aux_residual_is_held_constant() -> None:
    """AuxK changes nothing for latents that are not dead: its target does not pull on the reconstruction."""
    sae, x, y = make("topk")
    dead = dead_latents()
    plain, helped = sae.gradients(x, y, NOBODY), sae.gradients(x, y, dead)

    for parameter in ("W_dec", "W_enc", "b_enc"):
        torch.testing.assert_close(helped.of[parameter][~dead], plain.of[parameter][~dead], rtol=1e-12, atol=0)


def test_bug_7_the_aux_reconstruction_has_no_bias() -> None:
    """Moving b_dec and x together moves neither residual nor aux reconstruction, so the aux loss stays."""
    sae, x, y = make("topk")
    before = sae.gradients(x, y, dead_latents()).loss["auxiliary"]
    sae.parameters["b_dec"] += 3.0
    after = sae.gradients(x + 3.0, y + 3.0, dead_latents()).loss["auxiliary"]

    torch.testing.assert_close(after, before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "gated auxk", "relu l1 auxk", "jumprelu auxk"])
def test_bug_8_the_aux_loss_is_part_of_the_gradient(name: str) -> None:
    """Twice the weight adds once more what the weight added, in the loss and in every gradient."""
    results = []
    for weight in (0.25, 0.5):
        sae, x, y = build_sae(case(name).model_copy(update={"aux_weight": weight}))
        results.append(sae.gradients(x, y, dead_latents()))
    plain = sae.gradients(x, y, NOBODY)

    assert float(results[1].loss["auxiliary"]) == pytest.approx(2 * float(results[0].loss["auxiliary"]))
    for parameter, gradient in plain.of.items():
        once, twice = results[0].of[parameter] - gradient, results[1].of[parameter] - gradient
        torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("number_dead", [0, 1, 3, 4])
def test_bug_5_auxk_with_few_dead_latents_is_finite(number_dead: int) -> None:
    """With 0, 1, k_aux − 1 and k_aux dead latents, nothing is infinite and with none there is no such loss."""
    sae, x, y = make("topk")
    gradients = sae.gradients(x, y, dead_latents(number_dead))

    assert all(bool(value.isfinite().all()) for value in gradients.of.values())
    assert ("auxiliary" in gradients.loss) == (number_dead > 0)


def test_nothing_is_left_for_auxk_to_explain() -> None:
    """A residual that is the same on every row has no spread to be measured by: no loss, and no division by zero."""
    sae, x, y = make("topk")
    gradients = sae.gradients(x[:1], y[:1], dead_latents())

    assert "auxiliary" not in gradients.loss


def test_bug_33_the_gradient_does_not_grow_with_the_batch() -> None:
    """Losses are means over rows: the same rows twice give the same loss and the same gradient."""
    for kind in FAMILY:
        sae, x, y = make(kind)
        once, twice = sae.gradients(x, y, NOBODY), sae.gradients(x.repeat(2, 1), y.repeat(2, 1), NOBODY)

        for name, value in once.loss.items():
            torch.testing.assert_close(twice.loss[name], value, rtol=1e-12, atol=0)
        for name, value in once.of.items():
            torch.testing.assert_close(twice.of[name], value, rtol=1e-9, atol=1e-12)


# Matryoshka


@pytest.mark.parametrize("kind", ["topk matryoshka", "batchtopk matryoshka", "jumprelu matryoshka"])
def test_each_prefix_reconstructs_alone(kind: str) -> None:
    """The loss is the mean over levels of the error that b_dec and the latents below each end leave."""
    sae, x, y = make(kind)
    gradients = sae.gradients(x, y, NOBODY)
    latents = gradients.fired.dense()
    errors = [
        (y - latents[:, :end] @ sae.W_dec[:end] - sae.b_dec).square().sum(1).mean() / sae.variance for end in sae.ends
    ]

    torch.testing.assert_close(gradients.loss["reconstruction"], torch.stack(errors).mean())
    torch.testing.assert_close(gradients.y_hat, latents @ sae.W_dec + sae.b_dec)


def test_a_segment_receives_the_gradients_of_all_levels_above_it() -> None:
    """W_dec's row i gets Σ over the levels that hold it of latents_i · ∂L/∂y_hat of that level, and no others."""
    sae, x, y = make("topk matryoshka")
    gradients = sae.gradients(x, y, NOBODY)
    latents = gradients.fired.dense()
    expected = torch.zeros_like(sae.W_dec)
    for end in sae.ends:
        error = y - latents[:, :end] @ sae.W_dec[:end] - sae.b_dec
        expected[:end] -= 2 * latents[:, :end].T @ error / (len(sae.ends) * BATCH * sae.variance)

    torch.testing.assert_close(gradients.of["W_dec"], expected, rtol=1e-9, atol=1e-12)


def test_one_level_is_the_ordinary_loss() -> None:
    """matryoshka = [d_sae] changes nothing."""
    sae, x, y = make("topk matryoshka", matryoshka=[D_SAE])
    plain, _, _ = make("topk")

    for name, value in plain.gradients(x, y, NOBODY).of.items():
        assert torch.equal(sae.gradients(x, y, NOBODY).of[name], value)


# The weight of the penalty


@pytest.mark.parametrize("kind", ["jumprelu", "relu l1", "relu l1_norm", "relu tanh", "tied", "gated"])
def test_the_penalty_weighs_what_is_in_force_of_it(kind: str) -> None:
    """During sparsity_warmup_tokens a part of the weight applies, in the loss and in the gradient."""
    sae, x, y = make(kind)
    none, half, all_of_it = (sae.gradients(x, y, NOBODY, part) for part in (0.0, 0.5, 1.0))

    assert float(none.loss["sparsity"]) == 0
    torch.testing.assert_close(half.loss["sparsity"], all_of_it.loss["sparsity"] / 2)
    for name in none.of:
        torch.testing.assert_close(half.of[name], (none.of[name] + all_of_it.of[name]) / 2, rtol=1e-9, atol=1e-12)


def test_bug_15b_the_pull_on_l0_changes_sign_at_the_target() -> None:
    """Too many active latents are pushed down, too few pulled up: thresholds and encoder biases both."""
    for target, sign in ((1.0, -1), (30.0, 1)):
        sae, x, y = make("jumprelu", target_l0=target, bandwidth=3.0)
        pulled, plain = sae.gradients(x, y, NOBODY).of, sae.gradients(x, y, NOBODY, 0.0).of

        # A step goes against the gradient.
        assert sign == -int(torch.sign((pulled["b_enc"] - plain["b_enc"]).sum()))
        assert sign == int(torch.sign((pulled["threshold"] - plain["threshold"]).sum()))


def test_settings_of_the_family_are_all_different() -> None:
    """No two entries of the list above test the same."""
    documents = [settings_of(kind).model_dump_json() for kind in FAMILY]

    assert len(set(documents)) == len(FAMILY)
