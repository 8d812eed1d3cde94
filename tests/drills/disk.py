"""A disk that is full or read-only while checkpoints and snapshots are due."""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.drills.scene import Outcome, Scene, small_disk
from trainer.snapshot import snapshot_names
from trainer.state.checkpoint import complete_folders, read

PARTS = ("run/checkpoint", "run/snapshots")


def full(folder: Path, quick: bool) -> Outcome:
    """No byte is left: training goes on, the old checkpoint stays, and the next one comes when there is room."""
    ballast: list[Path] = []

    def fill(disk: Path) -> None:
        ballast.append(disk / "ballast")
        with open(ballast[0], "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    return _without_disk(folder, quick, fill, lambda disk: ballast.pop().unlink())


def read_only(folder: Path, quick: bool) -> Outcome:
    """The folders of checkpoints and snapshots turn read-only, as after an error of the disk, and come back.

    Not the whole disk: a file system that somebody holds a file open on cannot be made read-only from outside.
    """

    def harm(disk: Path) -> None:
        for part in PARTS:
            _mount("--bind", disk / part, disk / part)
            _mount("-o", "remount,ro,bind", disk / part)

    def mend(disk: Path) -> None:
        for part in PARTS:
            subprocess.run(["umount", str(disk / part)], check=True)

    return _without_disk(folder, quick, harm, mend)


def _mount(*words: object) -> None:
    """Tries again while a file there is just being written."""
    for _ in range(100):
        if not subprocess.run(["mount", *map(str, words)], capture_output=True).returncode:
            return
        time.sleep(0.02)
    raise PermissionError(f"mount {' '.join(map(str, words))} is not possible here")


def _without_disk(folder: Path, quick: bool, harm: Callable[[Path], None], mend: Callable[[Path], None]) -> Outcome:
    rounds, epochs = (1, 4) if quick else (4, 16)
    with (
        small_disk(folder / "disk", 8) as disk,
        Scene(
            folder, f"run.directory={disk / 'run'}", f"corpus.epochs={epochs}", "snapshots.every_tokens=20000"
        ) as scene,
    ):
        scene.run = disk / "run"
        checkpoints = scene.run / "checkpoint"
        trainer = scene.trainer(SECONDS_PER_STEP=0.02)
        scene.producer()
        for number in range(rounds):
            scene.wait(
                lambda: complete_folders(checkpoints) and snapshot_names(scene.run),
                what="for the first files",
            )
            harm(disk)
            for what in ("checkpoint", "snapshot"):
                message = f"{what} not written"
                scene.wait(
                    lambda told=message, number=number: scene.log().count(told) > number, 30.0, f"for {message!r}"
                )
            before = scene.trained_rows
            read(complete_folders(checkpoints)[-1])  # the one from before is whole
            scene.wait(lambda before=before: scene.trained_rows > before + 1000, 20.0, "for training to go on")
            assert trainer.poll() is None
            mend(disk)
            newest = complete_folders(checkpoints)[-1]
            scene.wait(lambda newest=newest: complete_folders(checkpoints)[-1] != newest, 20.0, "for the next one")
        assert trainer.wait(300) == 0
        return scene.outcome(rounds, epochs)
