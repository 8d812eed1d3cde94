"""The two numbers of this machine that an estimate needs, measured in about two seconds, and its free memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch

from producer.lm.precision import product_dtype
from trainer.planning import cost
from trainer.planning.cost import Machine, StepCost

COPY_BYTES = 3 * 2**28
"""Moved by the measured copy, half of them read: more than fits into a cache of half a gigabyte."""


def measure_machine(sae: StepCost, device_name: str, threads: int, matmul: str = "auto") -> Machine:
    """Measures a product of the shape that `sae` needs, and a large copy."""
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels = cost.CPU if device.type == "cpu" else cost.CUDA
        dtype = product_dtype(matmul, sae.batch, sae.d_in, sae.d_sae, device)
        rows = min(sae.batch, max(256, kernels.block_bytes // (sae.d_sae * dtype.itemsize)))
        flops = 2 * rows * sae.d_in * sae.d_sae / _seconds(_product(rows, sae, dtype, device), device)
        bandwidth = COPY_BYTES / _seconds(_copy(device), device)
    finally:
        torch.set_num_threads(threads_before)
    hardware = f"this machine, {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    name = f"{hardware}, products in {dtype}".replace("torch.", "")
    return Machine(name, flops, bandwidth, _memory(device), kernels, dtype.itemsize)


def _product(rows: int, sae: StepCost, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The encoder product of one block of activations, into memory that is allocated already."""
    x, W = (torch.randn(size, sae.d_in, device=device).to(dtype) for size in (rows, sae.d_sae))
    out = torch.zeros(rows, sae.d_sae, dtype=dtype, device=device)
    return lambda: torch.mm(x, W.T, out=out)


def _copy(device: torch.device) -> Callable[[], object]:
    source, sink = (torch.ones(COPY_BYTES // 8, device=device) for _ in range(2))
    return lambda: sink.copy_(source)


def _seconds(function: Callable[[], object], device: torch.device, at_least: float = 0.4) -> float:
    """Median seconds of a call, of as many calls as fill `at_least` seconds, and of five at least."""

    def timed() -> float:
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed()
    times: list[float] = []
    while sum(times) < at_least or len(times) < 5:
        times.append(timed())
    return median(times)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
