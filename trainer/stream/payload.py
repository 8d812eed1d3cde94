"""The payload of a chunk: bits of numbers, looked at without copying them.

By numpy: each of torch's operations lets go of the interpreter, and would have to wait for it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from producer.wire import DTYPE_BYTES, Hello

TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BITS = {"bfloat16": np.int16, "float32": np.int32}
INFINITY = {2: 0x7F80, 4: 0x7F800000}
"""The bits of infinity in bfloat16 and float32; those of the NaNs come after them."""


def split_payload(
    hello: Hello, data: memoryview, rows: int, hooks: Sequence[int] = ()
) -> list[np.ndarray | None] | None:
    """Views of a payload's bits, one [rows, width] array per hook; None when it is empty or of another size.

    The payload holds those of `hooks`, by number, of all when there are none; None stands for each of the others.
    """
    numbers = hooks or range(len(hello.hooks))
    if not all(number < len(hello.hooks) for number in numbers):
        return None  # the ledger rejects it
    widths = [hello.hooks[number].width for number in numbers]
    if not rows or len(data) != rows * sum(widths) * DTYPE_BYTES[hello.dtype]:
        return None
    bits = np.frombuffer(data, BITS[hello.dtype])
    ends = np.cumsum([rows * width for width in widths])
    views: list[np.ndarray | None] = [None] * len(hello.hooks)
    for number, end, width in zip(numbers, ends, widths, strict=True):
        views[number] = bits[end - rows * width : end].reshape(rows, width)
    return views


def is_finite(bits: Sequence[np.ndarray | None]) -> bool:
    """Whether no array of numbers' bits holds NaN or infinity. Exact, and several times faster than a sum.

    As integers, the positive ones that are not finite are the largest; as unsigned ones, the negative ones are.
    """
    for part in bits:
        if part is None:
            continue
        infinity, sign = INFINITY[part.itemsize], 1 << (8 * part.itemsize - 1)
        if part.max() >= infinity or part.view(f"u{part.dtype.itemsize}").max() >= infinity + sign:
            return False
    return True


def bits_of(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """The same memory as integers, since numpy does not know bfloat16; an array is taken to be that already."""
    return x if isinstance(x, np.ndarray) else x.view({2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()
