"""The run directory of a trainer at work: locked, and identified by its inode beside its path.

A folder can be moved or removed while its trainer works. The trainer then stops, with a checkpoint where the folder is
now: files written anew under the old path would be a second record of the same run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from trainer.state.durable import make_folder

log = logging.getLogger("sluice.trainer")

WATCH_SECONDS = 0.5


class RunDirectoryError(Exception):
    """The run directory cannot be used, or has been moved. The message says what to do."""


class RunDirectory:
    """Makes `path` where it is missing, and holds its lock; a context manager.

    Raises RunDirectoryError when another trainer holds the lock, or when the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise RunDirectoryError(
                f"run.directory = {path} cannot be used: {error.strerror}; choose another"
            ) from None
        try:
            self._lock = open(path / "lock", "a+")  # noqa: SIM115 (closed on exit)
        except OSError as error:
            os.close(self._folder)
            raise RunDirectoryError(
                f"{path / 'lock'}, the run's lock, cannot be opened: {error.strerror}; mend or remove it, or choose "
                "another run.directory"
            ) from None
        self._stop = threading.Event()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.__exit__()
            if isinstance(error, BlockingIOError):
                raise RunDirectoryError(
                    f"run.directory = {path} belongs to a trainer that is running; stop it or choose another"
                ) from None
            raise RunDirectoryError(
                f"{path / 'lock'} cannot be locked: {error.strerror}; choose a run.directory on another file system"
            ) from None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._lock.close()
        os.close(self._folder)

    @property
    def is_in_place(self) -> bool:
        """Whether the path still leads to the locked folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except OSError:
            return False

    @property
    def current_path(self) -> Path | None:
        """Where the folder is now; None when it was removed, or where the system does not tell."""
        if self.is_in_place:
            return self.path
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._folder}"))
            return path if os.path.samestat(os.stat(path), os.fstat(self._folder)) else None
        except OSError:
            return None

    def watch(self, on_move: Callable[[], object]) -> None:
        """Calls `on_move` once, as soon as the folder is no longer in place; from a thread of its own."""

        def poll() -> None:
            while not self._stop.wait(WATCH_SECONDS):
                if not self.is_in_place:
                    log.error("%s", self.fault())
                    on_move()
                    return

        threading.Thread(target=poll, name="run-directory", daemon=True).start()

    def fault(self) -> str:
        """What happened to a folder that is not in place, and what to do."""
        if (path := self.current_path) is None:
            return f"run.directory = {self.path} was removed while the trainer worked in it: what it held is lost"
        return (
            f"run.directory = {self.path} was moved to {path} while the trainer worked in it: training stops, and goes "
            "on when the trainer is started with that as run.directory, or when the folder is moved back"
        )
