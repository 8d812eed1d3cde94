"""The sparse kernels for a CPU, compiled by numba at their first call and cached on disk.

Torch's own operations cost memory traffic here: temporaries of the size of the weights, and indices in 64 bit. Each
kernel passes once over rows that no other thread writes, so that results do not depend on the number of threads.
Matrices are float32, float64 or bfloat16, which is read as float32; sums are at least float32. `cuda.py` has the same
functions.

All kernels are in one file because of numba's cache: compiled code holds until the file of its function changes, not
that of a function it calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

_intrinsic: Any = intrinsic  # calls have no first argument, which a type checker cannot know
compiled = njit(
    nogil=True,
    cache=True,
    error_model="numpy",
    # Sums may be vectorised; NaN stays NaN.
    fastmath={"contract", "reassoc", "nsz"},
)
GROUPS = 384
"""Groups of one row's latents in `topk`: their maxima are three cache lines times four."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")


def _run(count: int, kernel: Callable[..., None], *arguments: Any, at_least: int = 32) -> None:
    """Calls kernel(begin, end, *arguments) for slices of 0 … count, on as many threads as torch uses here."""
    threads = torch.get_num_threads()
    pieces = min(4 * threads, count // at_least) if threads > 1 else 1
    if pieces <= 1:
        kernel(0, count, *arguments)
        return
    bounds = [count * piece // pieces for piece in range(pieces + 1)]
    futures = [_pool().submit(kernel, *span, *arguments) for span in pairwise(bounds[1:])]
    kernel(bounds[0], bounds[1], *arguments)
    for future in futures:
        future.result()


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers as a contiguous array, copied if necessary; bfloat16 as its bits."""
    return _memory(tensor.contiguous())


def _memory(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as an array, for results; bfloat16 as its bits."""
    assert tensor.is_contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


@_intrinsic
def load(typing_context: Any, number: Any) -> Any:
    """The value of a number in an array: a float itself, or the bfloat16 number with these 16 bits."""
    if number != types.int16:
        return number(number), lambda context, builder, signature, arguments: arguments[0]

    def widen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = context.get_value_type(types.uint32)
        bits = builder.shl(builder.zext(arguments[0], to), to(16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(number), widen


@_intrinsic
def store(typing_context: Any, number: Any, place: Any) -> Any:
    """`number` in the type of `place`; for 16 bits those of the nearest bfloat16 number, ties to even."""

    def nearest(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = context.get_value_type(types.uint32)
        bits = builder.bitcast(context.cast(builder, arguments[0], number, types.float32), to)
        odd = builder.and_(builder.lshr(bits, to(16)), to(1))
        bits = builder.add(bits, builder.add(odd, to(0x7FFF)))
        return builder.trunc(builder.lshr(bits, to(16)), context.get_value_type(types.int16))

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], number, place)

    return place(number, place), nearest if place == types.int16 else cast


# Products


def multiply(start: Tensor, column: Tensor, value: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """Σ value · W[column] over the entries of each row: W [columns, d] → [rows, d], in `out` if there is one."""
    if out is None:
        out = torch.empty(len(start) - 1, W.shape[1], dtype=value.dtype)
    _run(len(out), _multiply, _array(start), _array(column), _array(value), _array(W), _memory(out))
    return out


multiply_transposed = multiply
"""The same with the entries in the order of columns, and X [batch, d] in W's place: [columns, d]."""


@compiled
def _multiply(begin, end, start, column, value, W, out):  # type: ignore[no-untyped-def]
    for b in range(begin, end):
        out[b] = 0
        _add_rows(out[b], start[b], start[b + 1], column, value, W)


@compiled
def _add_rows(total, begin, end, column, value, W):  # type: ignore[no-untyped-def]
    """total += Σ value[e] · W[column[e]], four entries at a time, for one load and store of the sum."""
    e = begin
    while e + 4 <= end:
        w0, w1, w2, w3 = W[column[e]], W[column[e + 1]], W[column[e + 2]], W[column[e + 3]]
        v0, v1, v2, v3 = value[e], value[e + 1], value[e + 2], value[e + 3]
        for j in range(len(total)):
            total[j] += v0 * load(w0[j]) + v1 * load(w1[j]) + v2 * load(w2[j]) + v3 * load(w3[j])
        e += 4
    while e < end:
        w0, v0 = W[column[e]], value[e]
        for j in range(len(total)):
            total[j] += v0 * load(w0[j])
        e += 1


def sample(start: Tensor, column: Tensor, A: Tensor, W: Tensor) -> Tensor:
    """A[row] · W[column] at each entry: A [rows, d], W [columns, d] → [entries]."""
    out = torch.empty(len(column), dtype=A.dtype)
    _run(len(A), _sample, _array(start), _array(column), _array(A), _array(W), _array(out))
    return out


@compiled
def _sample(begin, end, start, column, A, W, out):  # type: ignore[no-untyped-def]
    for b in range(begin, end):
        _dots(A[b], start[b], start[b + 1], column, W, out)


@compiled
def _dots(a, begin, end, column, W, out):  # type: ignore[no-untyped-def]
    """out[e] = a · W[column[e]], four entries at a time, for one load of `a`."""
    zero, e = out.dtype.type(0), begin
    while e + 4 <= end:
        w0, w1, w2, w3 = W[column[e]], W[column[e + 1]], W[column[e + 2]], W[column[e + 3]]
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(len(a)):
            s0 += a[j] * load(w0[j])
            s1 += a[j] * load(w1[j])
            s2 += a[j] * load(w2[j])
            s3 += a[j] * load(w3[j])
        out[e], out[e + 1], out[e + 2], out[e + 3] = s0, s1, s2, s3
        e += 4
    while e < end:
        w0, s0 = W[column[e]], zero
        for j in range(len(a)):
            s0 += a[j] * load(w0[j])
        out[e] = s0
        e += 1


def decode(
    start: Tensor, column: Tensor, value: Tensor, W: Tensor, b: Tensor, y: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y_hat, g, |y − y_hat|², sampled): the reconstruction of y, and the gradient of weight · |y − y_hat|².

    y_hat = entries @ W + b and g = 2 weight (y_hat − y) are [rows, d], the squares [rows], sampled = g[row] · W[column]
    is [entries]. g is in the type of W, for products. In one pass, since a row of W that was read for y_hat is still in
    the cache for `sampled`.
    """
    y_hat, g, sampled = torch.empty_like(y), torch.empty_like(y, dtype=W.dtype), torch.empty_like(value)
    square, factor = y.new_empty(len(y)), y.new_tensor(2 * weight).numpy()[()]
    inputs = [_array(tensor) for tensor in (start, column, value, W, b, y)]
    _run(len(y), _decode, *inputs, factor, *(_memory(tensor) for tensor in (y_hat, g, square, sampled)))
    return y_hat, g, square, sampled


@compiled
def _decode(begin, end, start, column, value, W, b, y, factor, y_hat, g, square, sampled):  # type: ignore[no-untyped-def]
    wide = np.empty_like(b)
    for r in range(begin, end):
        output, target, narrow, total = y_hat[r], y[r], g[r], square.dtype.type(0)
        output[:] = b
        _add_rows(output, start[r], start[r + 1], column, value, W)
        for j in range(len(wide)):
            error = output[j] - target[j]
            wide[j] = factor * error
            narrow[j] = store(factor * error, narrow[j])
            total += error * error
        square[r] = total
        _dots(wide, start[r], start[r + 1], column, W, sampled)


def centred(x: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """x − b in `dtype`, rounded once: x [rows, d], b [d]."""
    out = torch.empty_like(x, dtype=dtype)
    _run(len(x), _centred, _array(x), _array(b), _memory(out))
    return out


@compiled
def _centred(begin, end, x, b, out):  # type: ignore[no-untyped-def]
    for r in range(begin, end):
        row, narrow = x[r], out[r]
        for j in range(len(row)):
            narrow[j] = store(row[j] - b[j], narrow[j])


def transpose(start: Tensor, column: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(start [columns + 1], row [entries], order [entries]): a counting sort by column, rows ascending within each."""
    first = torch.empty(columns + 1, dtype=torch.int64)
    row, order = torch.empty_like(column), torch.empty_like(column)
    _transpose(*(_array(tensor) for tensor in (start, column, first, row, order)))
    return first, row, order


@compiled
def _transpose(start, column, first, row, order):  # type: ignore[no-untyped-def]
    first[:] = 0
    for e in range(len(column)):
        first[column[e] + 1] += 1
    for i in range(1, len(first)):
        first[i] += first[i - 1]
    free = first[:-1].copy()
    for b in range(len(start) - 1):
        for e in range(start[b], start[b + 1]):
            place = free[column[e]]
            free[column[e]] = place + 1
            row[place] = b
            order[place] = e


def sums(start: Tensor, value: Tensor) -> Tensor:
    """Σ value over the entries of each column, `value` in the order of columns: [columns]."""
    out = torch.empty(len(start) - 1, dtype=value.dtype)
    _run(len(out), _sums, _array(start), _array(value), _array(out))
    return out


@compiled
def _sums(begin, end, start, value, out):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        total = out.dtype.type(0)
        for e in range(start[i], start[i + 1]):
            total += value[e]
        out[i] = total


ROWS_OF_MOMENTS = 64
"""Rows that `moments` adds up at a time, whatever the number of threads."""


def moments(x: Tensor, y: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ x, Σ y, [Σ |x|², Σ |y|², Σ x · y, Σ |x − y|²]) over rows x, y [rows, d] less `centre` [d], in float64."""
    pieces = -(-len(x) // ROWS_OF_MOMENTS)
    sums_x, sums_y = (torch.zeros(pieces, x.shape[1], dtype=torch.float64) for _ in range(2))
    squares = torch.zeros(pieces, 4, dtype=torch.float64)
    arrays = [_array(tensor) for tensor in (x, y, centre)]
    _run(pieces, _moments, *arrays, *(_memory(tensor) for tensor in (sums_x, sums_y, squares)), at_least=4)
    return sums_x.sum(0), sums_y.sum(0), squares.sum(0)


@compiled
def _moments(begin, end, x, y, centre, sums_x, sums_y, squares):  # type: ignore[no-untyped-def]
    for piece in range(begin, end):
        for b in range(piece * ROWS_OF_MOMENTS, min(len(x), (piece + 1) * ROWS_OF_MOMENTS)):
            xx, yy, xy, ee = 0.0, 0.0, 0.0, 0.0
            for j in range(len(centre)):
                one, other = np.float64(x[b, j] - centre[j]), np.float64(y[b, j] - centre[j])
                sums_x[piece, j] += one
                sums_y[piece, j] += other
                xx += one * one
                yy += other * other
                xy += one * other
                ee += (one - other) * (one - other)
            squares[piece] += np.array([xx, yy, xy, ee])


# Selection


def _nan_is_largest(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    (value,) = arguments
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, value.type(float("inf")), value)


@_intrinsic
def key(typing_context: Any, number: Any) -> Any:
    """A number of the same order as the value: a float itself, or an integer for the 16 bits of a bfloat16 number.

    NaN is the largest, as in torch, so that it is selected and noticed.
    """

    def ordered(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        negative = builder.ashr(bits, bits.type(15))  # all ones below zero, where larger bits are smaller numbers
        return builder.xor(bits, builder.and_(negative, bits.type(0x7FFF)))

    return number(number), ordered if number == types.int16 else _nan_is_largest


@_intrinsic
def size(typing_context: Any, number: Any) -> Any:
    """Like `key`, for comparisons of numbers from zero on only: their bits are in order already."""
    identity = lambda context, builder, signature, arguments: arguments[0]  # noqa: E731
    return number(number), identity if number == types.int16 else _nan_is_largest


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(value, index) of the k largest in each row of [rows, n], in no order; of equal ones the first. Exact.

    A row is cut into groups. Bisection gives a floor that k of their maxima reach; no element below it is among the k
    largest, because k others are above. The elements that reach it, few more than k, are the candidates.
    """
    rows, n = values.shape
    groups = max(GROUPS, 2 * k)
    index = torch.zeros(rows, k, dtype=torch.int64)
    _run(rows, _topk, _array(values), k, groups if 8 * groups <= n else n, _array(index))
    return values.gather(1, index), index


@compiled
def _topk(begin, end, values, k, groups, index):  # type: ignore[no-untyped-def]
    n = values.shape[1]
    best, scratch = np.empty(groups, values.dtype), np.empty(n, values.dtype)
    candidate, position = np.empty(n, values.dtype), np.empty(n, np.int64)
    for b in range(begin, end):
        row = values[b]
        # Group g holds g, g + groups, g + 2 groups, …: the maxima then run over contiguous memory.
        for g in range(groups):
            best[g] = key(row[g])
        for first in range(groups, n, groups):
            part = row[first : first + groups]
            for g in range(len(part)):
                best[g] = max(best[g], key(part[g]))
        floor = _floor(best, k)
        count = 0
        for g in range(groups):
            if best[g] >= floor:
                for i in range(g, n, groups):
                    if key(row[i]) >= floor:
                        candidate[count] = key(row[i])
                        position[count] = i
                        count += 1
        scratch[:count] = candidate[:count]
        least = _kth_largest(scratch, count, k)
        place = 0
        for c in range(count):
            if candidate[c] > least:
                index[b, place] = position[c]
                place += 1
        equal = np.sort(position[:count][candidate[:count] == least])
        index[b, place:] = equal[: k - place]


@compiled
def _floor(values, k):  # type: ignore[no-untyped-def]
    """A number that at least k of `values`, and few more, reach."""
    low, high = values.min(), values.max()
    for _ in range(20):
        middle = values.dtype.type(low + 0.5 * (high - low))
        count = _reaching(values, middle)
        if count >= k:
            low = middle
        else:
            high = middle
        if k <= count <= k + k // 8:
            break
    return low


@compiled
def _reaching(values, floor):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(len(values)):
        count += np.int32(values[i] >= floor)
    return count


@compiled
def _kth_largest(values, count, k):  # type: ignore[no-untyped-def]
    """The k-th largest of values[:count], which change their order (Hoare's selection)."""
    low, high, rank = 0, count - 1, k - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            high = j
        elif rank >= i:
            low = i
        else:
            break
    return values[rank]


CHUNK = 64
"""Elements of which `above` first asks whether any exceeds the floor."""


def count_above(values: Tensor, floor: float) -> Tensor:
    """Starts [rows + 1] of each row's elements above `floor` ≥ 0 in a list of them all; values [rows, n]."""
    start = torch.zeros(len(values) + 1, dtype=torch.int64)
    _run(len(values), _count_above, _array(values), _bound(values, floor), _array(start))
    return torch.cumsum(start, 0, out=start)


def above(values: Tensor, floor: float, start: Tensor) -> tuple[Tensor, Tensor]:
    """(column, value) of the elements above `floor`, with `start` from `count_above`; bfloat16 becomes float32."""
    column = torch.empty(int(start[-1]), dtype=torch.int64)
    value = torch.empty(len(column), dtype=torch.promote_types(values.dtype, torch.float32))
    arrays = [_array(tensor) for tensor in (start, column, value)]
    _run(len(values), _above, _array(values), _bound(values, floor), *arrays)
    return column, value


def _bound(values: Tensor, floor: float) -> np.ndarray:
    """`floor` in the type of `values`, as an array for compiled functions."""
    return _array(torch.tensor([floor]).to(values.dtype))


@compiled
def _count_above(begin, end, values, floor, start):  # type: ignore[no-untyped-def]
    for b in range(begin, end):
        start[b + 1] = _exceeding(values[b], size(floor[0]))


@compiled
def _exceeding(values, floor):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(len(values)):
        count += np.int32(size(values[i]) > floor)
    return count


@compiled
def _above(begin, end, values, floor, start, column, value):  # type: ignore[no-untyped-def]
    bound = size(floor[0])
    for b in range(begin, end):
        e = start[b]
        for first in range(0, values.shape[1], CHUNK):
            chunk = values[b, first : first + CHUNK]
            if _exceeding(chunk, bound):
                for i in range(len(chunk)):
                    if size(chunk[i]) > bound:
                        column[e] = first + i
                        value[e] = load(chunk[i])
                        e += 1


# Optimizer


def project(grad: Tensor, W: Tensor | None) -> Tensor:
    """The squared norm of each row of `grad` [rows, d], after its component along the unit row of W is removed."""
    out = torch.empty(len(grad), dtype=grad.dtype)
    _run(len(grad), _project, _memory(grad), _array(grad if W is None else W), W is not None, _memory(out))
    return out


@compiled
def _project(begin, end, grad, W, tangent, out):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        g, along, square = grad[i], out.dtype.type(0), out.dtype.type(0)
        if tangent:
            for j in range(len(g)):
                along += g[j] * W[i, j]
            for j in range(len(g)):
                g[j] -= along * W[i, j]
        for j in range(len(g)):
            square += g[j] * g[j]
        out[i] = square


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
    number = W.numpy().dtype.type
    constants = (
        rate / (1 - betas[0] ** step), 1 - betas[0], betas[1], 1 - betas[1], (1 - betas[1] ** step) ** -0.5, eps,
        float(scale),
    )  # fmt: skip
    arrays = [_memory(tensor) for tensor in (W, grad, m, v)]
    bits = np.empty((0, 0), np.int16) if half is None else _memory(half)
    _run(len(W), _adam_rows, *arrays, bits, *(number(constant) for constant in constants), unit)


@compiled
def _adam_rows(begin, end, W, grad, m, v, half, rate, new_m, old_v, new_v, debias, eps, scale, unit):  # type: ignore[no-untyped-def]
    one = scale / scale
    for i in range(begin, end):
        w, g, first, second, square = W[i], grad[i], m[i], v[i], scale * 0
        for j in range(len(w)):
            x = scale * g[j]
            mean = first[j] + new_m * (x - first[j])
            spread = old_v * second[j] + new_v * x * x
            moved = w[j] - rate * mean / (np.sqrt(spread) * debias + eps)
            first[j], second[j], w[j] = mean, spread, moved
            square += moved * moved
        norm = one / max(np.sqrt(square), W.dtype.type(1e-12)) if unit else one
        if len(half):
            narrow = half[i]
            for j in range(len(w)):
                moved = norm * w[j]
                w[j] = moved
                narrow[j] = store(moved, narrow[j])
        elif unit:
            for j in range(len(w)):
                w[j] *= norm


def warm_up() -> None:
    """Compiles the kernels of a first step, or loads them from disk: seconds better spent before activations arrive."""
    x, zeros = torch.ones(2, 2), torch.zeros(2, 2)
    start, column, value = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)
    first, row, _ = transpose(start, column, 2)
    sums(first, value)
    moments(x, x, x[0])
    project(zeros.clone(), x)
    for dtype in (torch.bfloat16, torch.float32):
        W = x.to(dtype)
        topk(W, 1)
        above(W, 0.0, count_above(W, 0.0))
        g = decode(start, column, value, W, x[0], centred(x, x[0], torch.float32), 1.0)[1]
        grad = multiply_transposed(first, row, value, centred(g.float(), x[0], dtype))
        half = W if dtype == torch.bfloat16 else None
        adam_rows(x.clone(), grad, zeros.clone(), zeros.clone(), half, 1.0, (0.9, 0.9), 1.0, 1, torch.ones(()), True)
