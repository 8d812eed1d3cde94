"""The sparse products and the choices of latents, each against its dense formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels import select
from trainer.kernels.dense import Dense
from trainer.kernels.select import exceeds, largest, largest_of_batch, positive, topk
from trainer.kernels.sparse import Entries, occurrences

SPARSE, DENSE = 2.0, 0.0
"""Values of DENSE_ABOVE that always give the one or the other."""


@pytest.fixture(params=[SPARSE, DENSE], ids=["sparse", "dense"])
def representation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(select, "DENSE_ABOVE", request.param)
    return float(request.param)


def some_pre_acts() -> Tensor:
    """With an empty row and an empty column."""
    torch.manual_seed(0)
    pre_acts = torch.randn(9, 16, dtype=torch.float64)
    pre_acts[4] = -5.0
    pre_acts[:, 3] = -5.0
    return pre_acts


# Choosing


def test_two_stage_topk_is_exact() -> None:
    """The grouped search finds the same values as a plain one, with duplicates and negatives among them."""
    torch.manual_seed(0)
    for rows, n, k in ((50, 4096, 32), (7, 1024, 1), (3, 512, 15)):
        values = torch.randn(rows, n).mul_(4).round_().div_(4)
        value, index = topk(values, k)

        torch.testing.assert_close(value.sort(1).values, values.topk(k).values.sort(1).values)
        torch.testing.assert_close(values.gather(1, index), value)
        assert all(k == len(set(row.tolist())) for row in index)


def test_bug_1_a_zero_winner_has_not_fired(representation: float) -> None:
    """With fewer positive pre-activations than k, the rest of the k entries are zeros and count for nothing."""
    latents = largest(torch.tensor([[3.0, -1.0, -2.0, 1.0]]), 3)

    assert latents.firings().tolist() == [1, 0, 0, 1]
    assert latents.dense().tolist() == [[3, 0, 0, 1]]


def test_the_largest_magnitudes_keep_their_signs(representation: float) -> None:
    """abs: −3 is larger than 2, stays −3, and has fired."""
    latents = largest(torch.tensor([[1.0, -3.0, 2.0, -0.5]]), 2, magnitude=True)

    assert latents.dense().tolist() == [[0, -3, 2, 0]]
    assert latents.firings().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positive_entries_are_those_above_zero(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero, minus zero, negatives and the smallest positive number, in every format the encoder product has."""
    monkeypatch.setattr(select, "DENSE_ABOVE", SPARSE)
    latents = positive(torch.tensor([[0.0, -0.0, 1.0], [-1.0, 1e-38, -1e-38]], dtype=dtype))

    assert isinstance(latents, Entries)
    assert torch.stack([latents.row(), latents.column], 1).tolist() == [[0, 2], [1, 1]]


def test_bfloat16_is_compared_by_its_bits() -> None:
    """The fast comparison is the plain one, for every floor that is used and every kind of number."""
    torch.manual_seed(0)
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-38, -1e-38, 3e38, -3e38, 0.5])]).bfloat16()
    for floor in (0.0, 0.5, 1e-3):
        assert torch.equal(exceeds(values, floor), values > torch.tensor(floor).bfloat16())


@pytest.mark.parametrize("guess", [0.0, 0.9, 50.0])
def test_the_largest_of_a_batch_whatever_the_guess(guess: float, representation: float) -> None:
    """The guess of where the smallest one lies decides the speed, never the choice."""
    torch.manual_seed(0)
    pre_acts = torch.randn(20, 32)
    latents, smallest = largest_of_batch(pre_acts, 40, guess)
    value = pre_acts.flatten().topk(40).values

    assert isinstance(latents, Dense if representation == DENSE else Entries)
    assert smallest == float(value.min())
    assert torch.equal(latents.dense(), pre_acts * (pre_acts >= smallest))


def test_ties_at_the_end_of_a_batch_go_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly `count` are chosen, and the same ones every time."""
    monkeypatch.setattr(select, "DENSE_ABOVE", SPARSE)
    latents, smallest = largest_of_batch(torch.tensor([[1.0, 2.0], [1.0, 1.0], [3.0, -1.0]]), 4, 0.0)

    assert latents.dense().tolist() == [[1, 2], [1, 0], [3, 0]]
    assert smallest == 1.0


def test_fewer_positive_values_than_asked_for(representation: float) -> None:
    """BatchTopK takes what is above zero and no more; with nothing at all there is no smallest."""
    latents, smallest = largest_of_batch(torch.tensor([[1.0, -2.0], [-1.0, 0.5]]), 4, 0.0)
    nothing, none = largest_of_batch(torch.full((3, 2), -1.0), 4, 0.7)

    assert latents.dense().tolist() == [[1, 0], [0, 0.5]]
    assert smallest == 0.5
    assert not nothing.firings().any()
    assert none == 0.0


def test_a_guess_that_is_not_a_number_is_forgiven() -> None:
    """After a batch of NaN the next one is chosen from as ever."""
    for dtype in (torch.float32, torch.bfloat16):
        latents, _ = largest_of_batch(torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=dtype), 2, float("nan"))

        assert latents.dense().tolist() == [[0, 2], [3, 0]]


# Products


def test_products_equal_dense_ones(representation: float) -> None:
    """multiply, sample, transpose, sums: each against its formula, with empty rows and columns."""
    pre_acts = some_pre_acts()
    W, X = torch.randn(16, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    latents, matrix = positive(pre_acts), pre_acts.relu()
    by_column = latents.transpose()
    sampled = latents.with_value(latents.sample(X, W))
    other = latents.value * 2

    torch.testing.assert_close(latents.dense(), matrix)
    torch.testing.assert_close(latents.multiply(W), matrix @ W)
    torch.testing.assert_close(sampled.dense(), (X @ W.T) * (matrix > 0))
    torch.testing.assert_close(by_column.multiply(other, X), 2 * matrix.T @ X)
    torch.testing.assert_close(by_column.sums(other), 2 * matrix.sum(0))
    assert latents.firings().tolist() == (matrix > 0).sum(0).tolist()


def test_what_each_entry_has_of_its_latent(representation: float) -> None:
    """`at` looks a vector up by latent."""
    latents, of_latents = positive(some_pre_acts()), torch.arange(16.0, dtype=torch.float64)
    scaled = latents.with_value(latents.value * latents.at(of_latents))

    torch.testing.assert_close(scaled.dense(), some_pre_acts().relu() * of_latents)


def test_segments_are_products_of_their_own(representation: float) -> None:
    """Cut at 4, 5 and 16: one block of rows per segment, in every product."""
    pre_acts, ends = some_pre_acts(), (4, 5, 16)
    W, X = torch.randn(16, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    A = torch.randn(27, 5, dtype=torch.float64)
    matrix = pre_acts.relu()
    latents = positive(pre_acts).split(ends)
    segment = torch.tensor([0, 0, 0, 0, 1] + [2] * 11)
    cut = torch.cat([matrix * (segment == number) for number in range(3)])  # [27, 16]
    by_column = latents.transpose()
    sampled = latents.sample(A, W)

    torch.testing.assert_close(latents.multiply(W), cut @ W)
    torch.testing.assert_close(by_column.multiply(latents.value, A), cut.T @ A)
    torch.testing.assert_close(by_column.multiply(latents.value, X), matrix.T @ X)
    torch.testing.assert_close(by_column.sums(sampled), ((A @ W.T) * (cut > 0)).sum(0))
    assert latents.firings().tolist() == (matrix > 0).sum(0).tolist()


def test_an_empty_segment() -> None:
    """Nothing active in one of the nested dictionaries."""
    pre_acts = torch.full((3, 8), -1.0)
    pre_acts[:, 6] = 1.0
    latents = positive(pre_acts).split((4, 8))

    assert not latents.multiply(torch.ones(8, 2))[:3].any()
    assert latents.multiply(torch.ones(8, 2))[3:].tolist() == [[1, 1]] * 3


def test_no_entries_at_all() -> None:
    """A batch on which nothing fires is a batch like others."""
    empty = Entries(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 8)

    assert empty.multiply(torch.randn(8, 5)).tolist() == [[0.0] * 5] * 3
    assert len(empty.sample(torch.randn(3, 5), torch.randn(8, 5))) == 0
    assert empty.transpose().sums(empty.value).tolist() == [0.0] * 8
    assert empty.transpose().multiply(empty.value, torch.randn(3, 5)).tolist() == [[0.0] * 5] * 8
    assert empty.split((2, 8)).rows == 6


def test_occurrences_are_counted_where_asked() -> None:
    """A bincount, of all or of some."""
    index = torch.tensor([2, 0, 2, 2])

    assert occurrences(index, 4).tolist() == [1, 0, 3, 0]
    assert occurrences(index, 4, torch.tensor([True, False, True, False])).tolist() == [0, 0, 2, 0]


def test_sums_repeat_bit_for_bit(representation: float) -> None:
    """Every sum has a fixed order: the same batch gives the same bits."""
    torch.manual_seed(0)
    latents, X = largest(torch.randn(50, 64), 8), torch.randn(50, 7)
    first, second = (latents.transpose().multiply(latents.value, X) for _ in range(2))

    assert torch.equal(first, second)
