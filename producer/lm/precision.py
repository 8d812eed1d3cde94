"""The number format that is fastest on this machine, for the language model and the SAEs; deterministic algorithms."""

from __future__ import annotations

import os
import time

import torch

WORTH = 1.3
"""bfloat16 must be this much faster to be worth its fewer digits."""


def fastest_dtype(rows: int, d_in: int, d_out: int, device: torch.device) -> torch.dtype:
    """float32 or bfloat16 for products [rows, d_in] × [d_in, d_out], as measured here in a few milliseconds.

    CPUs without bfloat16 units emulate it, slower than float32; those with them are several times faster.
    """
    if device.type == "cuda":
        return torch.bfloat16
    rows = min(rows, 1024)
    float32, bfloat16 = (_seconds(rows, d_in, d_out, dtype) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if WORTH * bfloat16 < float32 else torch.float32


def product_dtype(name: str, rows: int, d_in: int, d_out: int, device: torch.device) -> torch.dtype:
    """The dtype of products of this shape by its name, such as "bfloat16"; "auto" takes the fastest one."""
    return fastest_dtype(rows, d_in, d_out, device) if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without the module, such as "bfloat16": the attribute of torch that it is."""
    return str(dtype).removeprefix("torch.")


def use_deterministic_algorithms() -> None:
    """Makes a GPU give the same bits each time; torch warns of operations that cannot. Call before its first use.

    On a CPU nothing is changed: the operations used there add in a fixed order.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _seconds(rows: int, d_in: int, d_out: int, dtype: torch.dtype) -> float:
    a, b = torch.ones(rows, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b.T
        best = min(best, time.perf_counter() - start)
    return best
