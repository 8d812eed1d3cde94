"""The run directory as the trainer that works in it holds it: locked, and known by more than its path.

A folder can be moved or removed while its trainer lives. The trainer then stops with a checkpoint where the folder is
now: whatever it made anew under the old path would be a second truth about the run.
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


class HomeError(Exception):
    """The run directory cannot be used, or is no longer where it was. The message says what to do."""


class Home:
    """Holds the lock of `path`, which is made when it is missing; a context manager.

    Raises HomeError when another trainer has it, or when it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise HomeError(f"run.directory = {path} cannot be used: {error.strerror}; choose another") from None
        try:
            self._lock = open(path / "lock", "a+")  # noqa: SIM115 (closed on exit)
        except OSError as error:
            os.close(self._folder)
            raise HomeError(
                f"{path / 'lock'}, the run's lock, cannot be opened: {error.strerror}; mend or remove it, or choose "
                "another run.directory"
            ) from None
        self._stop = threading.Event()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.__exit__()
            if isinstance(error, BlockingIOError):
                raise HomeError(
                    f"run.directory = {path} belongs to a trainer that is running; stop it or choose another"
                ) from None
            raise HomeError(
                f"{path / 'lock'} cannot be locked: {error.strerror}; choose a run.directory on another file system"
            ) from None

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._lock.close()
        os.close(self._folder)

    @property
    def is_here(self) -> bool:
        """Whether the path still leads to the folder that is locked."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except OSError:
            return False

    @property
    def present_path(self) -> Path | None:
        """Where the folder is now; None when it was removed, or where the system does not tell."""
        if self.is_here:
            return self.path
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._folder}"))
            return path if os.path.samestat(os.stat(path), os.fstat(self._folder)) else None
        except OSError:
            return None

    def watch(self, moved: Callable[[], object]) -> None:
        """Calls `moved`, once, as soon as the folder is no longer here."""

        def look() -> None:
            while not self._stop.wait(WATCH_SECONDS):
                if not self.is_here:
                    log.error("%s", self.fault())
                    moved()
                    return

        threading.Thread(target=look, name="home", daemon=True).start()

    def fault(self) -> str:
        """What has become of the folder, and what to do."""
        if (path := self.present_path) is None:
            return f"run.directory = {self.path} was removed while the trainer worked in it: what it held is lost"
        return (
            f"run.directory = {self.path} was moved to {path} while the trainer worked in it: training stops, and goes "
            "on when the trainer is started with that as run.directory, or when the folder is moved back"
        )
