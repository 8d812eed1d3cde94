"""What torchrun tells a process: its rank, and how many there are. Light: no torch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

AGENT_POLL_SECONDS = 0.5

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """How this process was started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this rank among those of its machine: also the number of its GPU."""
    local_world_size: int = 1


ONE_PROCESS = Launch()

LATENTS_PER_UNIT = 1024
"""Ranks hold whole units of so many latents, so that no two of them write to one page of a snapshot's file."""


def read_launch(environment: Mapping[str, str]) -> Launch:
    """The launch that torchrun's environment variables describe; that of one process without them."""
    if any(name not in environment for name in NAMES):
        return ONE_PROCESS
    rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in NAMES[:4])
    return Launch(rank, world_size, local_rank, local_world_size)


def watch_agent(on_death: Callable[[], object]) -> None:
    """Calls `on_death` once, from a thread of its own, when torchrun's agent, the parent of this process, has ended.

    Ranks that outlive their agent would go on, and keep the run directory from those that another one starts.
    """
    agent = os.getppid()

    def poll() -> None:
        while os.getppid() == agent:
            time.sleep(AGENT_POLL_SECONDS)
        on_death()

    threading.Thread(target=poll, name="agent", daemon=True).start()
