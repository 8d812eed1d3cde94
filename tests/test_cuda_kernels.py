"""The Triton kernels, each against its formula in dense float64.

On a machine without a GPU Triton's interpreter runs the same source on the CPU; with one, the tests carry the mark
`gpu` and are run by `make gpu`. The interpreter accepts more than the compiler does, so that without a GPU every kernel
is compiled as well.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

# Read when triton is imported for the first time, which nothing else here does.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
pytest.importorskip("triton", reason="triton is made for Linux only")

from trainer.kernels import cuda  # noqa: E402 (after the choice above)

ROOT = Path(__file__).parent.parent
FLOATS = [torch.float32, torch.float64]
ALL_FLOATS = [*FLOATS, torch.bfloat16, torch.float16]
BETAS, EPS = (0.9, 0.999), 1e-8


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled here: `make gpu` runs it")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    INTERPRETED or not torch.cuda.is_available(), reason="torch sees no CUDA GPU, or TRITON_INTERPRET=1"
                ),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    torch.manual_seed(0)
    return torch.device(request.param)


def compressed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(start, column, value) of what is not zero."""
    row, column = matrix.nonzero(as_tuple=True)
    start = torch.zeros(len(matrix) + 1, dtype=torch.int64, device=matrix.device)
    start[1:] = torch.bincount(row, minlength=len(matrix)).cumsum(0)
    return start, column, matrix[row, column]


def some_matrix(rows: int, columns: int, active: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """With an empty row and an empty column; the rest is active in part."""
    matrix = torch.randn(rows, columns, device=device, dtype=dtype)
    matrix *= torch.rand(rows, columns, device=device) < active
    matrix[4], matrix[:, 3] = 0, 0
    return matrix


def close(ours: Tensor, theirs: Tensor) -> None:
    """To the digits of our type; `theirs` is the formula in float64."""
    rtol = 1e-11 if ours.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=3 * rtol)


# Products


@pytest.mark.parametrize("d", [1, 5, 130, 768])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_products_are_those_of_full_matrices(dtype: torch.dtype, d: int, device: torch.device) -> None:
    """multiply, sample, multiply_transposed: with widths that fill no block, and slices of columns."""
    wide = torch.promote_types(dtype, torch.float32)
    matrix = some_matrix(7, 12, 0.4, device, wide)
    W, X = (torch.randn(n, d, device=device).to(dtype) for n in (12, 7))
    start, column, value = compressed(matrix)
    start_there, row, order = cuda.transpose(start, column, 12)

    assert cuda.sample(start, column, X, W).dtype == wide
    close(cuda.multiply(start, column, value, W), matrix.double() @ W.double())
    close(cuda.sample(start, column, X, W), (X.double() @ W.double().T)[matrix != 0])
    close(cuda.multiply_transposed(start_there, row, value[order], X), matrix.T.double() @ X.double())


@pytest.mark.parametrize("d", [5, 130])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_decoding_and_its_gradient(dtype: torch.dtype, d: int, device: torch.device) -> None:
    """y_hat, the gradient of the squared error, the error of each row, and what the gradient makes of the entries."""
    wide = torch.promote_types(dtype, torch.float32)
    matrix = some_matrix(7, 12, 0.4, device, wide)
    W, b, y = torch.randn(12, d, device=device).to(dtype), *torch.randn(8, d, device=device, dtype=wide).split([1, 7])
    y_hat, g, square, sampled = cuda.decode(*compressed(matrix), W, b[0], y, 0.3)
    expected = matrix.double() @ W.double() + b.double()
    grad = 2 * 0.3 * (expected - y.double())

    close(y_hat, expected)
    close(g, grad)
    close(square, (y - expected).square().sum(1))
    close(sampled, (grad @ W.double().T)[matrix != 0])


def test_products_are_written_where_they_are_wanted(device: torch.device) -> None:
    """`out` is filled, whatever stood there, and returned."""
    matrix, W = some_matrix(9, 20, 0.3, device, torch.float32), torch.randn(20, 5, device=device)
    start, column, value = compressed(matrix)
    for multiply in (cuda.multiply, cuda.multiply_transposed):
        out = torch.full((9, 5), torch.nan, device=device)

        assert multiply(start, column, value, W, out) is out
        close(out, matrix.double() @ W.double())


@pytest.mark.parametrize("columns", [70, 40_000, 70_000])
def test_the_transpose_is_a_stable_sort(columns: int, device: torch.device) -> None:
    """Keys of 16 bits, also beyond 2¹⁵, and of 32."""
    column = torch.randint(columns, (1200,), device=device)
    column[::3] = columns - 1
    start = torch.tensor([0, 0, 500, 500, 900, 1200], device=device)
    start_there, row, order = cuda.transpose(start, column, columns)

    assert torch.equal(order, torch.argsort(column, stable=True))
    assert torch.equal(start_there.diff(), torch.bincount(column, minlength=columns))
    assert torch.equal(row, torch.repeat_interleave(start.diff())[order])


def test_indices_may_be_narrow(device: torch.device) -> None:
    """int32 column and row, as int64."""
    matrix, W = some_matrix(9, 20, 0.3, device, torch.float32), torch.randn(20, 5, device=device)
    start, column, value = compressed(matrix)

    assert torch.equal(cuda.multiply(start, column.int(), value, W), cuda.multiply(start, column, value, W))
    close(cuda.sample(start, column.int(), matrix @ W, W), (matrix @ W @ W.T)[matrix != 0])
    close(cuda.multiply_transposed(start, column.int(), value, W), matrix.double() @ W.double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_dense_latent_is_shared_out(dtype: torch.dtype, device: torch.device) -> None:
    """Columns that begin and end within chunks, have whole ones, exactly one, or none; one is empty."""
    counts = torch.tensor([300, 2500, 1, 0, 511, 512, 248, 1024, 7], device=device)  # 512 begins at a chunk
    counts[6] = 512 * 8 - int(counts[:6].sum())
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row = torch.cat([torch.randperm(2500, device=device)[:count].sort().values for count in counts.tolist()])
    value, X = torch.randn(len(row), device=device, dtype=dtype), torch.randn(2500, 5, device=device, dtype=dtype)
    matrix = torch.zeros(9, 2500, dtype=torch.float64, device=device)
    matrix[torch.repeat_interleave(counts), row] = value.double()

    close(cuda.multiply_transposed(start, row, value, X), matrix @ X.double())
    close(cuda.sums(start, value), matrix.sum(1))


def test_nested_dictionaries(device: torch.device) -> None:
    """Segments below each other: a row for each segment, and columns that only their own segment's rows have."""
    matrix = some_matrix(9, 20, 0.5, device, torch.float32)
    segment = torch.tensor([0] * 4 + [1] + [2] * 15, device=device)
    blocks = torch.cat([matrix * (segment == number) for number in range(3)])  # [27, 20]
    W, A, X = (torch.randn(n, 5, device=device) for n in (20, 27, 9))
    start, column, value = compressed(blocks)
    start_there, row, order = cuda.transpose(start, column, 20)

    close(cuda.multiply(start, column, value, W), blocks.double() @ W.double())
    close(cuda.sample(start, column, A, W), (A.double() @ W.double().T)[blocks != 0])
    close(cuda.multiply_transposed(start_there, row, value[order], A), blocks.T.double() @ A.double())
    close(cuda.multiply_transposed(start_there, row % 9, value[order], X), matrix.T.double() @ X.double())


def test_no_entries_at_all(device: torch.device) -> None:
    """A batch on which nothing fires is a batch like others; so is one without rows."""
    start, none = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    value, W, X = torch.zeros(0, device=device), torch.randn(8, 5, device=device), torch.randn(3, 5, device=device)
    start_there, row, order = cuda.transpose(start, none, 8)

    assert cuda.multiply(start, none, value, W).tolist() == [[0.0] * 5] * 3
    assert cuda.multiply(start[:1], none, value, W).shape == (0, 5)
    assert cuda.sample(start, none, X, W).shape == (0,)
    assert cuda.decode(start, none, value, W, W[0], X, 1.0)[0].tolist() == [W[0].tolist()] * 3
    assert start_there.tolist() == [0] * 9
    assert len(row) == len(order) == 0
    assert cuda.multiply_transposed(start_there, row, value, X).tolist() == [[0.0] * 5] * 8
    assert cuda.sums(start_there, value).tolist() == [0.0] * 8


def test_blocks_do_not_change_the_sums(device: torch.device) -> None:
    """Narrow slices of large operands, and wide slices where partial sums would be too many."""
    matrix, W = some_matrix(9, 20, 0.3, device, torch.float64), torch.randn(20, 200, device=device, dtype=torch.float64)
    start, column, value = compressed(matrix)
    X = torch.randn(9, 200, device=device, dtype=torch.float64)
    assert cuda._tile(W, 0)["BLOCK"] == 64
    close(cuda.multiply(start, column, value, W, slice_bytes=0), matrix @ W)
    for partial_sums in (2**26, 3 * len(column), 1):
        sampled = cuda.sample(start, column, X, W, partial_sums, slice_bytes=0)
        close(sampled, (X @ W.T)[matrix != 0])
        decoded = cuda.decode(start, column, value, W, W[0], X, 0.5, partial_sums, slice_bytes=0)
        close(decoded[3], ((matrix @ W + W[0] - X) @ W.T)[matrix != 0])


def test_products_repeat_bit_for_bit(device: torch.device) -> None:
    """The same input gives the same bits, whatever ran before."""
    matrix, W = some_matrix(1300, 4, 0.9, device, torch.float32), torch.randn(1300, 64, device=device)
    start, column, value = compressed(matrix)
    start_there, row, order = cuda.transpose(start, column, 4)
    first, second = (cuda.multiply_transposed(start_there, row, value[order], W) for _ in range(2))
    sums, again = (cuda.sums(start_there, value[order]) for _ in range(2))

    assert torch.equal(first, second)
    assert torch.equal(sums, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="torch sees no CUDA GPU here")
def test_matrices_of_more_than_2_31_elements() -> None:
    """Addresses are of 64 bits: the last rows of a bfloat16 matrix of 4 GiB."""
    columns, d = 2**19 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    W = torch.zeros(columns, d, dtype=torch.bfloat16, device="cuda")
    W[-2:] = torch.randn(2, d, device="cuda").bfloat16()
    column = torch.tensor([columns - 2, columns - 1], device="cuda")
    start, value = torch.tensor([0, 2], device="cuda"), torch.tensor([2.0, 3.0], device="cuda")
    start_there, row, order = cuda.transpose(start, column, columns)
    X = torch.randn(1, d, device="cuda")

    close(cuda.multiply(start, column, value, W)[0], 2 * W[-2].double() + 3 * W[-1].double())
    close(cuda.sample(start, column, X, W), W[-2:].double() @ X[0].double())
    close(cuda.multiply_transposed(start_there, row, value[order], X)[-2:], value.double()[:, None] * X.double())


# Choosing


def check_topk(values: Tensor, k: int) -> None:
    """Index and value are those of a stable sort, NaN first."""
    value, index = cuda.topk(values, k)
    expected = torch.sort(values.double(), dim=1, descending=True, stable=True).indices[:, :k].sort(1).values

    assert torch.equal(index, expected)
    torch.testing.assert_close(value, values.gather(1, expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(3, 1, 1), (3, 100, 7), (1, 100, 100), (1, 4096, 512), (1, 5000, 33), (1, 8192, 1), (1, 2**17, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_is_exact(dtype: torch.dtype, rows: int, n: int, k: int, device: torch.device) -> None:
    """Of random numbers, and of few different ones, of which most are tied."""
    values = torch.randn(rows, n, device=device)
    check_topk(values.to(dtype), k)
    check_topk(values.mul(2).round().add(0.0).to(dtype), k)


@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_topk_wherever_the_largest_are(dtype: torch.dtype, device: torch.device) -> None:
    """All in one lane, all at an end, all equal, infinite, or not a number."""
    n, k = 5000, 40
    values = torch.randn(8, n, device=device).clamp_(-2, 2)
    values[0, 17::1024] = 3.0
    values[1, -50:] = 3.0
    values[2, :50] = 3.0
    values[3] = -1.0
    values[4] = -torch.inf
    values[5, 10:30] = torch.inf
    values[5, 3000:] = -torch.inf
    values[6, 4000:4010] = torch.nan
    values[7] = torch.arange(n, device=device) // 100

    check_topk(values.to(dtype), k)
    check_topk(values[:, :3000].to(dtype), k)  # a row at once, of a matrix that is not contiguous


def test_more_than_can_be_held_is_left_to_torch(device: torch.device) -> None:
    """The same values, with ties as they come."""
    values = torch.randn(2, 5000, device=device)
    value, index = cuda.topk(values, 600, most_candidates=1024)

    assert torch.equal(value.sort().values, values.topk(600).values.sort().values)
    assert torch.equal(values.gather(1, index), value)


@pytest.mark.parametrize("floor", [0.0, 1.23456789, -100.0, 100.0])
@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_above_is_everything_above(dtype: torch.dtype, floor: float, device: torch.device) -> None:
    """In the order of rows and columns, also when nothing is or everything; what equals the floor is not, NaN is."""
    values = torch.randn(5, 2500, device=device).to(dtype)
    bound = torch.tensor(floor).to(values)
    values[2] = -200.0
    values[0, 5:500] = bound
    values[1, :3] = torch.tensor([0.0, -0.0, torch.nan])
    start = cuda.count_above(values, floor)
    column, value = cuda.above(values, floor, start)
    expected_row, expected_column = (~(values <= bound)).nonzero(as_tuple=True)

    assert start.tolist() == [0, *torch.bincount(expected_row, minlength=5).cumsum(0).tolist()]
    assert torch.equal(column, expected_column)
    expected = values[expected_row, expected_column].to(torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


# The optimizer


@pytest.mark.parametrize("d", [1, 5, 768, 1030, 5000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_projection_leaves_what_is_tangent(dtype: torch.dtype, d: int, device: torch.device) -> None:
    """g − (g·w)w row by row in place, and the squared norms that remain; without W only the norms."""
    grad, W = (torch.randn(7, d, device=device, dtype=dtype) for _ in range(2))
    W = normalize(W)
    expected = grad.double() - (grad.double() * W.double()).sum(1, keepdim=True) * W.double()
    before = cuda.project(grad, None)

    close(before, grad.double().square().sum(1))
    close(cuda.project(grad, W), expected.square().sum(1))
    close(grad, expected)


@pytest.mark.parametrize(("rows", "d"), [(1, 1), (70, 130)])
def test_moments_are_taken_in_float64(rows: int, d: int, device: torch.device) -> None:
    """Sums and sums of squares of two matrices, far from the origin but not from their centre."""
    x, y = (torch.randn(rows, d, device=device) + 100 for _ in range(2))
    centre = torch.full((d,), 100.0, device=device)
    sum_x, sum_y, squares = cuda.moments(x, y, centre)
    x, y = (x - centre).double(), (y - centre).double()
    expected = torch.stack([x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).square().sum()])

    torch.testing.assert_close((sum_x, sum_y, squares), (x.sum(0), y.sum(0), expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (3, 2304), (6000,)])
def test_adam_is_torchs(shape: tuple[int, ...], unit: bool, device: torch.device) -> None:
    """Five steps with a rate that changes and gradients that are clipped; unit rows; a rounded copy."""
    if unit and len(shape) == 1:
        pytest.skip("a vector has no rows")
    ours = normalize(torch.randn(shape, device=device), dim=-1)
    m, v, half = torch.zeros_like(ours), torch.zeros_like(ours), torch.empty_like(ours, dtype=torch.bfloat16)
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], betas=BETAS, eps=EPS)
    for step in range(1, 6):
        grad, scale, rate = torch.randn(shape, device=device), torch.tensor(0.7 / step, device=device), 1e-2 / step
        theirs.grad, adam.param_groups[0]["lr"] = grad * scale, rate
        adam.step()
        if unit:
            theirs.data = normalize(theirs.data, dim=1)
        cuda.adam_rows(ours, grad, m, v, half, rate, BETAS, EPS, step, scale, unit)

        torch.testing.assert_close(ours, theirs.data, rtol=1e-5, atol=1e-6)
        if INTERPRETED:  # which cuts digits off, where a GPU rounds
            torch.testing.assert_close(half, ours.bfloat16(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(half, ours.bfloat16())
    torch.testing.assert_close(m, adam.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(v, adam.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_adam_without_a_copy(device: torch.device) -> None:
    """`half` is optional, with unit rows and without."""
    for unit in (False, True):
        W, grad = torch.ones(2, 5, device=device), torch.ones(2, 5, device=device)
        cuda.adam_rows(
            W, grad, grad * 0, grad * 0, None, 0.25, BETAS, EPS, 1, torch.ones((), device=device), unit
        )  # fmt: skip

        torch.testing.assert_close(W, torch.full_like(W, 5**-0.5 if unit else 0.75))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_norm_that_is_no_number_changes_nothing(scale: float, device: torch.device) -> None:
    """Weights, moments and the copy stay as they were, and the host need not look."""
    tensors = [torch.rand(2, 5, device=device) for _ in range(4)]
    half = tensors[0].bfloat16()
    before = [x.clone() for x in (*tensors, half)]
    cuda.adam_rows(*tensors, half, 1e-3, BETAS, EPS, 1, torch.tensor(scale, device=device), True)

    assert all(torch.equal(x, y) for x, y in zip((*tensors, half), before, strict=True))


# Compiling

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Hopper:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

def compile_only(kernel, *arguments, grid, warmup, **options):
    compiled.add(kernel.fn.__name__)
    return run(kernel, *arguments, grid=grid, warmup=True, **options)

compiled, run, JITFunction.run = set(), JITFunction.run, compile_only
driver.set_active(Hopper())
from trainer.kernels import cuda, cuda_rows, cuda_select

start, index = torch.tensor([0, 600, 600]), torch.zeros(600, dtype=torch.int64)
for dtype in (torch.float32, torch.bfloat16):
    W, value = torch.zeros(2, 768, dtype=dtype), torch.zeros(600)
    cuda.multiply(start, index, value, W)
    cuda.sample(start, index, W, W)
    cuda.decode(start, index, value, W, W[0].float(), W.float(), 0.5)
    cuda.multiply_transposed(start, index, value, W)
    cuda.topk(torch.zeros(1, 8192, dtype=dtype), 32)
    cuda.above(W, 0.5, cuda.count_above(W, 0.5))
cuda.sums(start, value)
W, half = W.float(), W
cuda.project(W, W)
cuda.moments(W, W, W[0])
for unit in (True, False):
    cuda.adam_rows(W, W, W, W, half, 1e-3, (0.9, 0.999), 1e-8, 1, torch.ones(()), unit)
kernels = {name for module in (cuda, cuda_rows, cuda_select) for name, kernel in vars(module).items()
           if isinstance(kernel, JITFunction) and kernel.fn.__annotations__["return"] == "None"}
assert compiled == kernels, compiled ^ kernels
"""


@pytest.mark.long
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """To machine code of a Hopper GPU, which needs none: types, shapes and names are what the compiler accepts."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
