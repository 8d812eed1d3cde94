"""The device that SAEs train on, and the threads of a CPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch


class DeviceError(ValueError):
    """The device asked for is not here."""


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of optimizer.device; auto takes a GPU when there is one. Each rank of a machine has a GPU of its own.

    Raises DeviceError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"optimizer.device = {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            'set it to "auto" or "cpu", or install a torch build for your CUDA'
        )
    return device


def default_threads(saes: int) -> int:
    """Threads of the step of each of `saes` SAEs that train at the same time."""
    return torch.get_num_threads() if saes == 1 else max(1, (os.cpu_count() or 1) // saes)


def make_thread_pool(threads: int, can_overlap: bool) -> ThreadPoolExecutor | None:
    """Threads that step several SAEs at the same time on a CPU, each with `threads` of the cores.

    The SAEs' steps are independent, and half of a step does not profit from a second thread: two SAEs on two cores
    take little longer than one. Without `can_overlap` one steps after the other.
    """
    cores = os.cpu_count() or 1
    threads = min(threads, cores)
    torch.set_num_threads(threads)
    return ThreadPoolExecutor(cores // threads, thread_name_prefix="sae") if can_overlap else None
