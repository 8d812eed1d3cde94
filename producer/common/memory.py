"""CONTRACT: how the C library treats memory that was freed. Shared by the language model and the SAEs."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30


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
