"""Signals, limits and priorities of the operating system, for the three daemons alike.

`stop_on_signals`: whatever a shell, a batch system or a closed terminal sends to end a process ends it cleanly. SIGHUP
is ignored where it was ignored at the start: that is what `nohup` means. `run_within_limits`: what the system refuses
(files, memory, threads: `ulimit`) ends a process with a sentence and exit code 1.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Ctrl-C and `kill`; a terminal that closes; what batch systems send before they kill, on request or out of time."""

NICE = 10
"""Niceness of work that may take longer. On Linux it is the thread's, not the process'."""
FEWEST_FILES = 128
SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG, errno.EAGAIN}
WORDS = ("can't start new thread", "cannot allocate memory", "can't allocate memory", "failed to map", "libllvm")
"""Parts of the messages of libraries that raise errors of their own when memory or threads run out."""


def stop_on_signals(stop: Callable[[], object]) -> None:
    """Calls `stop`, from a signal's handler, for every signal that asks a process to end."""
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stop())


def ignore_stopping() -> None:
    """Ignores further signals, so that nothing interrupts the leaving."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def give_way() -> None:
    """Lowers the priority of this thread, and of those that it starts, below that of a trainer on the same machine."""
    os.nice(NICE)


def run_within_limits(log: logging.Logger, work: Callable[[], int]) -> int:
    """Returns what `work` returns, or 1 with a sentence in `log` when the system has no files, memory or threads left.

    Too few files are reported before anything begins: libzmq ends the process where it cannot open one.
    """
    if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < FEWEST_FILES:
        log.error(
            "open files (ulimit -n) %d: sockets and libraries need %d at least; raise it with `ulimit -n %d`",
            files, FEWEST_FILES, FEWEST_FILES,
        )  # fmt: skip
        return 1
    default = threading.excepthook

    def explain_shortage(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and is_shortage(failed.exc_value):
            log.error("%s", _sentence(failed.exc_value))
        else:
            default(failed)

    threading.excepthook = explain_shortage
    try:
        return work()
    except Exception as error:
        if not is_shortage(error):
            raise
        log.error("%s", _sentence(error))
        return 1
    finally:
        threading.excepthook = default


def is_shortage(error: BaseException) -> bool:
    """Whether an error, or one that it comes from, says that the system refuses a resource."""
    return any(
        isinstance(one, MemoryError)
        or getattr(one, "errno", None) in SHORTAGES
        or any(word in str(one).lower() for word in WORDS)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str:
    limits = {
        "open files (ulimit -n)": resource.RLIMIT_NOFILE,
        "address space (ulimit -v)": resource.RLIMIT_AS,
        "size of a file (ulimit -f)": resource.RLIMIT_FSIZE,
        "processes and threads (ulimit -u)": resource.RLIMIT_NPROC,
    }
    limit_texts = [
        f"{name} {resource.getrlimit(kind)[0]:,}"
        for name, kind in limits.items()
        if resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
    ]
    what = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    limited = ", ".join(limit_texts) or "none"
    return f"the system refuses a resource: {what}. Limits of this process: {limited}; raise what is short"
