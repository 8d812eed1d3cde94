"""The sparse products and the choices of latents, each against its dense formula."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from trainer.kernels import cpu, portable
from trainer.kernels.dense import Dense
from trainer.kernels.select import dense_if_many, exceeding, joined, largest, largest_of, positive
from trainer.kernels.sparse import Entries, occurrences

SPARSE, DENSE = 2.0, 0.0
"""Values of `dense_above` that always give the one or the other."""


@pytest.fixture(params=[SPARSE, DENSE], ids=["sparse", "dense"])
def dense_above(request: pytest.FixtureRequest) -> float:
    return float(request.param)


def some_pre_acts() -> Tensor:
    """With an empty row and an empty column."""
    torch.manual_seed(0)
    pre_acts = torch.randn(9, 16, dtype=torch.float64)
    pre_acts[4] = -5.0
    pre_acts[:, 3] = -5.0
    return pre_acts


# Choosing


@pytest.fixture(params=[portable, cpu], ids=["portable", "cpu"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """Each set of kernels that runs on a CPU; `test_cuda_kernels.py` has the third."""
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "k"), [(50, 4096, 32), (7, 1024, 1), (3, 512, 15), (5, 4000, 400), (2, 9, 9)])
def test_topk_is_exact(kernels: ModuleType, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The search by groups finds the same values as a plain one, with duplicates and negatives among them."""
    torch.manual_seed(0)
    values = torch.randn(rows, n).mul_(4).round_().div_(4).to(dtype)
    value, index = kernels.topk(values, k)

    torch.testing.assert_close(value.sort(1).values, values.topk(k).values.sort(1).values)
    torch.testing.assert_close(values.gather(1, index), value)
    assert all(k == len(set(row.tolist())) for row in index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_negative_values_those_nearest_to_zero_are_the_largest(kernels: ModuleType, dtype: torch.dtype) -> None:
    """A row without a positive pre-activation; among bfloat16's bits, more stand for a smaller number there."""
    value, index = kernels.topk(torch.tensor([[-3.0, -1.0, -2.0, -4.0]], dtype=dtype), 2)

    assert sorted(index[0].tolist()) == [1, 2] and sorted(value[0].tolist()) == [-2.0, -1.0]


def test_of_equal_values_the_first_are_chosen() -> None:
    """All the same, or k in the middle of a run of equal ones: positions decide, so that a choice repeats."""
    values = torch.zeros(2, 6000)
    values[1, [5000, 3, 4000]] = 1.0
    _, index = cpu.topk(values, 4)

    assert [sorted(row) for row in index.tolist()] == [[0, 1, 2, 3], [0, 3, 4000, 5000]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_a_number_is_chosen(dtype: torch.dtype) -> None:
    """So that the loss is not a number either, and the step is skipped and counted."""
    values = torch.randn(3, 4000).to(dtype)
    values[1, 2000] = float("nan")
    value, _ = cpu.topk(values, 8)

    assert value.isnan().sum(1).tolist() == [0, 1, 0]
    assert exceeding(values, 0.0).value.isnan().sum() == 1


def test_bug_1_a_zero_winner_has_not_fired(dense_above: float) -> None:
    """With fewer positive pre-activations than k, the rest of the k entries are zeros and count for nothing."""
    latents = largest(torch.tensor([[3.0, -1.0, -2.0, 1.0]]), 3, dense_above=dense_above)

    assert latents.firings().tolist() == [1, 0, 0, 1]
    assert latents.dense().tolist() == [[3, 0, 0, 1]]


def test_the_largest_magnitudes_keep_their_signs(dense_above: float) -> None:
    """abs: −3 is larger than 2, stays −3, and has fired."""
    latents = largest(torch.tensor([[1.0, -3.0, 2.0, -0.5]]), 2, magnitude=True, dense_above=dense_above)

    assert latents.dense().tolist() == [[0, -3, 2, 0]]
    assert latents.firings().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positive_entries_are_those_above_zero(dtype: torch.dtype) -> None:
    """Zero, minus zero, negatives and the smallest positive number, in every format the encoder product has."""
    pre_acts = torch.tensor([[0.0, -0.0, 1.0], [-1.0, 1e-38, -1e-38]], dtype=dtype)
    latents = positive(pre_acts, dense_above=SPARSE)

    assert isinstance(latents, Entries)
    assert torch.stack([latents.row(), latents.column], 1).tolist() == [[0, 2], [1, 1]]


@pytest.mark.parametrize("floor", [0.0, 0.5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_that_is_above_a_floor(kernels: ModuleType, dtype: torch.dtype, floor: float) -> None:
    """Row by row, for every kind of number; bfloat16 is compared by its bits."""
    torch.manual_seed(0)
    values = torch.cat([torch.randn(993), torch.tensor([0.0, -0.0, 1e-38, -1e-38, 3e38, -3e38, 0.5])]).to(dtype)
    values = values.view(5, 200)
    start = kernels.count_above(values, floor)
    column, value = kernels.above(values, floor, start)
    expected = values > torch.tensor(floor).to(dtype)

    assert start.diff().tolist() == expected.sum(1).tolist()
    assert torch.equal(column, expected.nonzero()[:, 1])
    assert torch.equal(value, values[expected].to(value.dtype))


@pytest.mark.parametrize("floor", [0.0, 0.9])
def test_the_largest_of_a_batch(floor: float, dense_above: float) -> None:
    """Where candidates were cut off decides the speed, never the choice."""
    torch.manual_seed(0)
    pre_acts = torch.randn(20, 32)
    largest = largest_of(exceeding(pre_acts, floor), 40)
    latents = dense_if_many(largest, dense_above)
    value = pre_acts.flatten().topk(40).values

    assert isinstance(latents, Dense if dense_above == DENSE else Entries)
    assert torch.equal(latents.dense(), pre_acts * (pre_acts >= value.min()))


def test_ties_at_the_end_of_a_batch_go_to_the_first() -> None:
    """Exactly `count` are chosen, and the same ones every time."""
    latents = largest_of(exceeding(torch.tensor([[1.0, 2.0], [1.0, 1.0], [3.0, -1.0]]), 0.0), 4)

    assert latents.dense().tolist() == [[1, 2], [1, 0], [3, 0]]


def test_fewer_positive_values_than_asked_for() -> None:
    """BatchTopK takes what is above zero and no more, or nothing."""
    latents = largest_of(exceeding(torch.tensor([[1.0, -2.0], [-1.0, 0.5]]), 0.0), 4)
    nothing = largest_of(exceeding(torch.full((3, 2), -1.0), 0.0), 4)

    assert latents.dense().tolist() == [[1, 0], [0, 0.5]]
    assert not nothing.firings().any()


def test_blocks_of_rows_are_joined(dense_above: float) -> None:
    """A batch that was encoded in blocks has the latents of one that was not; one dense block makes all dense."""
    torch.manual_seed(0)
    pre_acts = torch.randn(7, 16)
    blocks = [positive(block, dense_above) for block in pre_acts.split(3)]

    assert torch.equal(joined(blocks).dense(), pre_acts.relu())
    assert torch.equal(joined([*blocks, Dense(torch.ones(1, 16), (16,))]).dense()[:7], pre_acts.relu())


# Products


def test_products_equal_dense_ones(dense_above: float) -> None:
    """multiply, sample, transpose, sums: each against its formula, with empty rows and columns."""
    pre_acts = some_pre_acts()
    W, X = torch.randn(16, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    latents, matrix = positive(pre_acts, dense_above), pre_acts.relu()
    by_column = latents.transpose()
    sampled = latents.with_value(latents.sample(X, W) * (latents.value != 0))
    other = latents.value * 2

    torch.testing.assert_close(latents.dense(), matrix)
    torch.testing.assert_close(latents.multiply(W), matrix @ W)
    torch.testing.assert_close(sampled.dense(), (X @ W.T) * (matrix > 0))
    torch.testing.assert_close(by_column.multiply(other, X), 2 * matrix.T @ X)
    torch.testing.assert_close(by_column.sums(other), 2 * matrix.sum(0))
    assert latents.firings().tolist() == (matrix > 0).sum(0).tolist()


def test_what_each_entry_has_of_its_latent(dense_above: float) -> None:
    """`at` looks a vector up by latent."""
    latents, of_latents = positive(some_pre_acts(), dense_above), torch.arange(16.0, dtype=torch.float64)
    scaled = latents.with_value(latents.value * latents.at(of_latents))

    torch.testing.assert_close(scaled.dense(), some_pre_acts().relu() * of_latents)


def test_segments_are_products_of_their_own(dense_above: float) -> None:
    """Cut at 4, 5 and 16: one block of rows per segment, in every product."""
    pre_acts, ends = some_pre_acts(), (4, 5, 16)
    W, X = torch.randn(16, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    A = torch.randn(27, 5, dtype=torch.float64)
    matrix = pre_acts.relu()
    latents = positive(pre_acts, dense_above).split(ends)
    segment = torch.tensor([0, 0, 0, 0, 1] + [2] * 11)
    blocks = torch.cat([matrix * (segment == number) for number in range(3)])  # [27, 16]
    by_column = latents.transpose()
    sampled = latents.sample(A, W) * (latents.value != 0)

    torch.testing.assert_close(latents.multiply(W), blocks @ W)
    torch.testing.assert_close(by_column.multiply(latents.value, A), blocks.T @ A)
    torch.testing.assert_close(by_column.multiply(latents.value, X), matrix.T @ X)
    torch.testing.assert_close(by_column.sums(sampled), ((A @ W.T) * (blocks > 0)).sum(0))
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


def test_every_kernel_agrees_with_torchs_own(kernels: ModuleType) -> None:
    """Each product, in each type of matrix, from entries with empty rows, empty columns and one full column."""
    torch.manual_seed(0)
    pre_acts = torch.randn(9, 16)
    pre_acts[4], pre_acts[:, 3], pre_acts[:, 7] = -5.0, -5.0, 1.0
    start = portable.count_above(pre_acts, 0.0)
    column, value = portable.above(pre_acts, 0.0, start)
    W, X = torch.randn(16, 37), torch.randn(9, 37)
    first, row, order = kernels.transpose(start, column, 16)
    matrix = pre_acts.relu()

    assert torch.equal(order, torch.argsort(column, stable=True))
    torch.testing.assert_close(kernels.sums(first, value[order]), matrix.sum(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        v, w, x = value.to(wide), W.to(dtype), X.to(dtype)
        dense = matrix.to(wide)
        torch.testing.assert_close(kernels.multiply(start, column, v, w), dense @ w.to(wide))
        torch.testing.assert_close(
            kernels.multiply_transposed(first, row, v[order], x, torch.empty(16, 37, dtype=wide)), dense.T @ x.to(wide)
        )
        y_hat, g, square, both = kernels.decode(start, column, v, w, W[0].to(wide), X.to(wide), 0.3)
        error = dense @ w.to(wide) + W[0].to(wide) - X.to(wide)
        torch.testing.assert_close(y_hat - X.to(wide), error)
        torch.testing.assert_close(g.to(dtype), (0.6 * error).to(dtype))  # it may be in W's type already
        torch.testing.assert_close(square, error.square().sum(1))
        torch.testing.assert_close(both, (0.6 * error @ w.to(wide).T)[dense > 0])
        sampled = kernels.sample(start, column, X.to(wide), w)
        torch.testing.assert_close(sampled, (X.to(wide) @ w.to(wide).T)[dense > 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_centred_before_they_are_rounded(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Rounded first, rows about a large mean would lose the digits that matter."""
    torch.manual_seed(0)
    b = 1000 + torch.randn(7)
    x = b + torch.randn(5, 7)

    assert torch.equal(kernels.centred(x, b, dtype), (x - b).to(dtype))


def test_moments_are_sums_in_float64(kernels: ModuleType) -> None:
    """More rows than are added at a time, far from the centre that is taken off."""
    torch.manual_seed(0)
    centre = 100 * torch.randn(7)
    x, y = torch.randn(150, 7) + centre, torch.randn(150, 7) + centre
    sum_x, sum_y, squares = kernels.moments(x, y, centre)
    x, y = x.double() - centre.double(), y.double() - centre.double()
    expected = torch.stack([x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).square().sum()])

    torch.testing.assert_close((sum_x, sum_y), (x.sum(0), y.sum(0)), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unit", [True, False])
def test_adam_is_torchs(kernels: ModuleType, dtype: torch.dtype, unit: bool) -> None:
    """Five steps of torch.optim.Adam on the same gradients, clipped by half; unit rows projected before and after."""
    torch.manual_seed(0)
    W = torch.randn(6, 21, dtype=dtype)
    W /= W.norm(dim=1, keepdim=True)
    theirs = torch.nn.Parameter(W.clone())
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-6)
    m, v, half = torch.zeros_like(W), torch.zeros_like(W), torch.zeros(6, 21, dtype=torch.bfloat16)
    for step in range(1, 6):
        grad = torch.randn(6, 21, dtype=dtype)
        tangent = grad - (grad * W).sum(1, keepdim=True) * W if unit else grad.clone()
        theirs.grad = 0.5 * tangent
        square = kernels.project(grad, W if unit else None)
        scale = torch.tensor(0.5, dtype=dtype)
        kernels.adam_rows(W, grad, m, v, half, 0.01, (0.9, 0.95), 1e-6, step, scale, unit)
        adam.step()
        if unit:
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)

        torch.testing.assert_close(square, tangent.square().sum(1))
        torch.testing.assert_close(W, theirs.data)
        assert torch.equal(half, W.bfloat16())


def test_moments_keep_what_float32_would_lose(kernels: ModuleType) -> None:
    """4096² + 63 is odd and beyond 2²⁴, so that float32 does not have it."""
    x = torch.ones(64, 1)
    x[0] = 4096.0
    _, _, squares = kernels.moments(x, torch.zeros(64, 1), torch.zeros(1))

    assert squares.tolist() == [4096**2 + 63, 0, 0, 4096**2 + 63]


def test_of_two_bfloat16_numbers_equally_near_the_even_one_is_stored(kernels: ModuleType) -> None:
    """As torch does it: 1 + 1/256 lies between 1 and 1 + 2/256, 1 + 3/256 between that and 1 + 4/256."""
    W = torch.tensor([[1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 1 + 1.01 / 256]])
    half, zeros = torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(1, 4)
    kernels.adam_rows(W, zeros, zeros.clone(), zeros.clone(), half, 0.0, (0.9, 0.9), 1e-6, 1, torch.tensor(1.0), False)

    assert ((half.float() - half.float().sign()) * 256).tolist() == [[0, 4, 0, 2]]


def test_threads_do_not_change_a_bit() -> None:
    """Whoever computes a row computes all of it."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    latents, W, X = largest(torch.randn(500, 640), 8), torch.randn(640, 50), torch.randn(500, 50)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            by_latent = latents.transpose()
            grad = by_latent.multiply(latents.value, X)
            results.append((latents.multiply(W), latents.sample(X, W), grad, cpu.project(grad.clone(), W)))
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_sums_repeat_bit_for_bit(dense_above: float) -> None:
    """Every sum has a fixed order: the same batch gives the same bits."""
    torch.manual_seed(0)
    latents, X = largest(torch.randn(50, 64), 8, dense_above=dense_above), torch.randn(50, 7)
    first, second = (latents.transpose().multiply(latents.value, X) for _ in range(2))

    assert torch.equal(first, second)
