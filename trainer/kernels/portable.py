"""The sparse kernels in torch's own operations: for any device, and for tests of the others.

The cost of products grows with the entries, not with batch × d_sae, and each output row is summed by one worker in a
fixed order, so that results repeat bit for bit.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
torch.sparse.check_sparse_tensor_invariants.disable()

GROUP = 16
"""Latents per group of the two-stage top-k."""


def multiply(start: Tensor, column: Tensor, value: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """Σ value · W[column] over the entries of each row: W [columns, d] → [rows, d]."""
    W = W.to(value.dtype)
    product = embedding_bag(column, W, start, per_sample_weights=value, mode="sum", include_last_offset=True)
    return product if out is None else out.copy_(product)


multiply_transposed = multiply
"""The same with the entries in the order of columns, and X [batch, d] in W's place: [columns, d]."""


def sample(start: Tensor, column: Tensor, A: Tensor, W: Tensor) -> Tensor:
    """A[row] · W[column] at each entry: A [rows, d], W [columns, d] → [entries]."""
    values = A.new_zeros(len(column))
    if not len(column):
        return values  # cuSPARSE fails without entries
    pattern = torch.sparse_csr_tensor(start, column, values, (len(A), len(W)))
    return torch.sparse.sampled_addmm(pattern, A, W.to(A.dtype).T, beta=0.0).values()


def decode(
    start: Tensor, column: Tensor, value: Tensor, W: Tensor, b: Tensor, y: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y_hat, g, |y − y_hat|², sampled): the reconstruction of y, and the gradient of weight · |y − y_hat|².

    y_hat = entries @ W + b and g = 2 weight (y_hat − y) are [rows, d], the squares [rows], sampled = g[row] · W[column]
    is [entries].
    """
    y_hat = multiply(start, column, value, W) + b
    error = y_hat - y
    g = 2 * weight * error
    return y_hat, g, error.square().sum(1), sample(start, column, g, W)


def centred(x: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """x − b in `dtype`, rounded once: x [rows, d], b [d]."""
    return (x - b).to(dtype)


def transpose(start: Tensor, column: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(start [columns + 1], row [entries], order [entries]): the entries by column, rows ascending within each."""
    # Narrow keys are sorted by radix, several times faster.
    order = torch.argsort(column.to(torch.int16 if columns <= 2**15 else torch.int32), stable=True)
    first = torch.zeros(columns + 1, dtype=torch.int64, device=order.device)
    torch.cumsum(occurrences(column, columns), 0, out=first[1:])
    row = torch.repeat_interleave(start.diff(), output_size=len(column))
    return first, row[order], order


def sums(start: Tensor, value: Tensor) -> Tensor:
    """Σ value over the entries of each column, `value` in the order of columns: [columns]."""
    return torch.segment_reduce(value, "sum", offsets=start, initial=0.0)


def moments(x: Tensor, y: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ x, Σ y, [Σ |x|², Σ |y|², Σ x · y, Σ |x − y|²]) over rows x, y [rows, d] less `centre` [d], in float64."""
    x, y = x - centre, y - centre
    squares = [part.sum(dtype=torch.float64) for part in (x.square(), y.square(), x * y, (x - y).square())]
    return x.sum(0, dtype=torch.float64), y.sum(0, dtype=torch.float64), torch.stack(squares)


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(value, index) of the k largest in each row of [rows, n], in no order. Exact.

    Where n is large, the k groups with the largest maxima come first; they hold all k largest values, because a value
    outside them is below k group maxima. One cheap pass and a search among 16 k candidates replace a search among n.
    """
    rows, n = values.shape
    groups = n // GROUP
    if n % GROUP or k * GROUP >= n // 2:
        return torch.topk(values, k, sorted=False)
    # Group g holds the columns g, g + groups, g + 2 groups, …: the maximum then runs over contiguous memory.
    best = torch.topk(values.view(rows, GROUP, groups).amax(1), k, sorted=False).indices
    member = torch.arange(GROUP, device=values.device) * groups
    candidate = (best[:, :, None] + member).view(rows, k * GROUP)
    value, place = torch.topk(values.gather(1, candidate), k, sorted=False)
    return value, candidate.gather(1, place)


def count_above(values: Tensor, floor: float) -> Tensor:
    """Starts [rows + 1] of each row's elements above `floor` in a list of them all; values [rows, n]."""
    start = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
    torch.cumsum((values > floor).sum(1), 0, out=start[1:])
    return start


def above(values: Tensor, floor: float, start: Tensor) -> tuple[Tensor, Tensor]:
    """(column, value) of the elements above `floor`, with `start` from `count_above`; bfloat16 becomes float32."""
    place = (values > floor).view(-1).nonzero().squeeze(1)
    return place % values.shape[1], values.view(-1)[place].to(torch.promote_types(values.dtype, torch.float32))


def project(grad: Tensor, W: Tensor | None) -> Tensor:
    """The squared norm of each row of `grad` [rows, d], after its component along the unit row of W is removed."""
    if W is not None:
        grad.addcmul_(W, (grad * W).sum(1, keepdim=True), value=-1.0)
    return grad.square().sum(1)


def adam_rows(
    W: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    half: Tensor | None,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    scale: Tensor,
    unit: bool,
) -> None:
    """One step of Adam (Kingma & Ba 2015) in place, for W [rows, d] with `grad` · `scale` and moments m, v.

    `step` counts from 1. With `unit` each row then has norm 1. `half` [rows, d] receives the rows in bfloat16.
    """
    grad = grad * scale
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    W.addcdiv_(m, (v / (1 - betas[1] ** step)).sqrt_().add_(eps), value=-rate / (1 - betas[0] ** step))
    if unit:
        W.div_(W.norm(dim=1, keepdim=True).clamp_min_(1e-12))
    if half is not None:
        half.copy_(W)


def occurrences(index: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """The number of times each of 0 … size − 1 is in `index` (where `counted` is True), int64 [size].

    Unlike torch.bincount it does not read the largest value first, for which the host would wait for the GPU.
    """
    ones = index.new_ones(()).expand_as(index) if counted is None else counted.to(index.dtype)
    return index.new_zeros(size).scatter_add_(0, index, ones)
