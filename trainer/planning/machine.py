"""Two numbers of this machine, measured in about two seconds, and the memory that is free; torch is imported late."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from trainer.planning import cost
from trainer.planning.cost import Machine, Work

if TYPE_CHECKING:
    import torch

COPY_BYTES = 3 * 2**28
"""Moved by the copy that is measured, half of it read: more than a cache of half a gigabyte keeps."""


def measure_machine(work: Work, device_name: str, threads: int, matmul: str = "auto") -> Machine:
    """Two numbers of this machine, in about two seconds: a product as `work` needs it, and a large copy."""
    import torch

    from producer.lm.precision import fastest_dtype

    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels = cost.CPU if device.type == "cpu" else cost.CUDA
        dtype = fastest_dtype(work.batch, work.d_in, work.d_sae, device) if matmul == "auto" else getattr(torch, matmul)
        rows = min(work.batch, max(256, kernels.block_bytes // (work.d_sae * dtype.itemsize)))
        flops = 2 * rows * work.d_in * work.d_sae / _seconds(_product(rows, work, dtype, device), device)
        bandwidth = COPY_BYTES / _seconds(_copy(device), device)
    finally:
        torch.set_num_threads(before)
    what = f"this machine, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else _gpu_name(device)
    name = f"{what}, products in {dtype}".replace("torch.", "")
    return Machine(name, flops, bandwidth, _memory(device), kernels, dtype.itemsize)


def _product(rows: int, work: Work, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The encoder product of one block of rows, into memory that is there."""
    import torch

    x, W = (torch.randn(size, work.d_in, device=device).to(dtype) for size in (rows, work.d_sae))
    out = torch.zeros(rows, work.d_sae, dtype=dtype, device=device)
    return lambda: torch.mm(x, W.T, out=out)


def _copy(device: torch.device) -> Callable[[], object]:
    import torch

    source, sink = (torch.ones(COPY_BYTES // 8, device=device) for _ in range(2))
    return lambda: sink.copy_(source)


def _seconds(act: Callable[[], object], device: torch.device, at_least: float = 0.4) -> float:
    """Median seconds of one call, of as many as fit into `at_least` seconds, and of five."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    times: list[float] = []
    while sum(times) < at_least or len(times) < 5:
        times.append(once())
    return median(times)


def _memory(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def free_memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process can still be given, of the machine and of its control group; infinity when unknown."""
    free = float("inf")
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in proc.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = 1024.0 * int(line.split()[1])
    with suppress(OSError, ValueError):  # there is no limit where it reads "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, float(limit - used + int(cache.get("inactive_file", 0))))
    return free


def _gpu_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device)
