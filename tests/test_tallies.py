"""Sums over held-out activations: measures of small sets that can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from monitor.evaluation.tallies import Tally
from trainer.saes.hooks import SaeHooks

Y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [10.0, 0.0]])
"""Four activations of norm 1 about the origin, and one ten times as heavy; their mean is (2, 0)."""


def tally_of(parts: list[tuple[Tensor, Tensor]], mean: Tensor, median_norm: float) -> Tally:
    """A tally of activations and reconstructions that come in parts."""
    sae: Any = SimpleNamespace(hooks=SaeHooks(("a",), ("a",)), d_sae=1, W_enc=torch.zeros(1, 2))
    tally = Tally(sae, {"a": mean.double()}, {"a": median_norm})
    for y, y_hat in parts:
        tally.fits["a"].add(y, y_hat)
        tally.activations += len(y)
    return tally


@pytest.mark.parametrize("cut", [0, 2, 5])
def test_a_heavy_activation_flatters_the_fvu_of_all_and_not_that_of_the_typical(cut: int) -> None:
    """Halved are the four of norm 1, whose own FVU is 1/4; the heavy one is exact, and FVU in all is 1/84."""
    y_hat = torch.cat([Y[:4] / 2, Y[4:]])
    tally = tally_of([(Y[:cut], y_hat[:cut]), (Y[cut:], y_hat[cut:])], Y.mean(0), median_norm=1.0)

    fit = tally.fit()
    assert fit["fvu"] == pytest.approx(1 / 84)
    assert fit["fvu_typical"] == pytest.approx(1 / 4)
    assert fit["fvu_per_activation"] == pytest.approx((1 / 4 + 1 / 36 + 1 / 20 + 1 / 20 + 0) / 5)
    assert tally.by_norm() == {
        "fvu_by_norm": {"up to 1": pytest.approx(1 / 20), "3 to 10": 0.0},
        "activations_by_norm": {"up to 1": 0.8, "3 to 10": 0.2},
        "variance_by_norm": {"up to 1": pytest.approx(20 / 84), "3 to 10": pytest.approx(64 / 84)},
    }


def test_tallies_of_parts_add_up() -> None:
    """Those of the corpora of a mixture give that of all."""
    whole = tally_of([(Y, Y / 2)], Y.mean(0), 1.0)
    total = tally_of([(Y[:3], Y[:3] / 2)], Y.mean(0), 1.0)
    total.include(tally_of([(Y[3:], Y[3:] / 2)], Y.mean(0), 1.0))

    assert total.fit() == pytest.approx(whole.fit())
    assert total.by_norm() == {name: pytest.approx(bands) for name, bands in whole.by_norm().items()}
