"""CONTRACT: memory that is free, and how the C library treats what was freed. Shared by language model and SAEs."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30


def free_memory(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process can still allocate, in the machine and in its control group; infinite when unknown."""
    free = float("inf")
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in proc.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = 1024.0 * int(line.split()[1])
    with suppress(OSError, ValueError):  # no limit where it reads "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, float(limit - used + int(cache.get("inactive_file", 0))))
    return free


def keep_freed_memory() -> None:
    """Lets this process use freed memory again, instead of handing it back to the system and asking for it anew.

    A pass of a language model makes and drops hundreds of tensors of some megabytes. Each is given back to the system,
    and comes again as pages that have to be cleared: a tenth of a small model's time on a CPU, and a third of a
    larger one's. Call it when what is needed only at the start is freed. Does nothing but with the GNU C library.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.malloc_trim(0)
        library.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
