"""Measures the steps of one rank between two reports: how long they take, and how much of that is exchange."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.parallel.ranks import Ranks
from trainer.report import RankReport


class RankMeter:
    """See the module's docstring. Times are the host's: on a GPU an exchange is the time to enqueue it."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        self._rank = rank
        self._ranks = ranks
        self._steps = 0
        self._seconds = 0.0
        self._exchange_seconds = 0.0
        self._last = (0.0, 0.0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures the block as one step."""
        begin, exchanged = time.perf_counter(), self._ranks.traffic.total_seconds
        yield
        self._steps += 1
        self._seconds += time.perf_counter() - begin
        self._exchange_seconds += self._ranks.traffic.total_seconds - exchanged

    def report(self, active_latents: float) -> RankReport:
        """The mean step since the last report, or the last one measured; begins a new interval."""
        if self._steps:
            self._last = self._seconds / self._steps, self._exchange_seconds / self._steps
        self._steps, self._seconds, self._exchange_seconds = 0, 0.0, 0.0
        step_seconds, exchange_seconds = self._last
        return RankReport(self._rank, step_seconds, exchange_seconds, memory_bytes(self._ranks.device), active_latents)


def memory_bytes(device: torch.device) -> int:
    """Memory that this process holds on the device; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
