"""The launch of a Triton kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the GPU that its tensors are on; nothing, when the grid has no programs."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    assert all(x.is_contiguous() for x in tensors)
    if all(grid):
        with torch.cuda.device_of(tensors[0]):
            # Explicit, because the default differs between versions of Triton.
            kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def power_of_two(number: float) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, math.ceil(number) - 1).bit_length()
