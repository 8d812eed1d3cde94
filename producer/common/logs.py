"""CONTRACT: the log of a process: one line for each record, which nobody outside can forge or flood.

    set_up("trainer")            the log of a process: whatever a message holds, it cannot look like another line
    OutsideLog(log)              for lines that another process can cause, as often as it likes

Names, errors and reasons come from the other side of a socket. Characters that do not print (line ends, escape
sequences of terminals, marks that turn the direction of text) are written as their escapes. Of each kind of line that
another process can cause, a few are written in a minute, and the others counted in one line at its end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BURST = 5
"""Lines of one kind that are written within WINDOW_SECONDS; the others are counted."""
WINDOW_SECONDS = 60.0
TEXT_LENGTH = 500
"""Characters of one text from outside that are written; the first ones tell most."""
INDENT = "    "


def set_up(process: str, level: int = logging.INFO) -> None:
    """Sends the log of this process to stderr, every line with the time, the name of the process and the level."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(f"%(asctime)s {process} %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])


class LineFormatter(logging.Formatter):
    """Lines that follow the first one of a record are indented, and nothing but line ends acts on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        first, *others = super().format(record).split("\n")
        return "\n".join([escape(first), *(INDENT + escape(line) for line in others)])


class OutsideLog:
    """A logger for lines that another process can cause. Thread-safe; a line's kind is its format string."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[str, _Kind] = {}

    def info(self, message: str, *arguments: object) -> None:
        self._write(logging.INFO, message, arguments)

    def warning(self, message: str, *arguments: object) -> None:
        self._write(logging.WARNING, message, arguments)

    def exception(self, message: str, *arguments: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, message, arguments, traceback=True)

    def flush(self, everything: bool = False) -> None:
        """Counts the lines that were not written, of each kind whose minute is over, or of all. To be called often."""
        now = self._clock()
        with self._lock:
            over = [name for name, kind in self._kinds.items() if everything or now - kind.began >= WINDOW_SECONDS]
            for kind in [self._kinds.pop(name) for name in over]:
                self._count(kind, now)

    def _write(self, level: int, message: str, arguments: tuple[object, ...], traceback: bool = False) -> None:
        now = self._clock()
        texts = tuple(one if isinstance(one, int | float) else _shorten(escape(str(one))) for one in arguments)
        with self._lock:
            kind = self._kinds.get(message)
            if kind is None or now - kind.began >= WINDOW_SECONDS:
                if kind is not None:
                    self._count(kind, now)
                self._kinds[message] = kind = _Kind(now, level, message)
            kind.lines += 1
            kind.last = texts
            if kind.lines <= BURST:
                self._log.log(level, message, *texts, exc_info=traceback)

    def _count(self, kind: _Kind, now: float) -> None:
        if (more := kind.lines - BURST) > 0:
            counted = f"{kind.message} (the last of %s more like it in %.0f s)"
            self._log.log(kind.level, counted, *kind.last, f"{more:,}", max(1.0, now - kind.began))


@dataclass
class _Kind:
    """Lines of one kind since `began`."""

    began: float
    level: int
    message: str
    lines: int = 0
    last: tuple[object, ...] = ()


def escape(text: str) -> str:
    """The text with every character that does not print written as its escape (`\\x1b`, `\\u202e`)."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} …"
