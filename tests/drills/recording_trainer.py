"""The real trainer, which also records the content of every activation it trains on.

    python tests/drills/recording_trainer.py ROWS_FILE RUN.toml [section.key=value …]

Where `named_producer` streams, an activation's content is its name, so ROWS_FILE lists the trained tokens in
order. What a killed trainer wrote after its last checkpoint is cut off when the next one resumes, so that the
file always holds the surviving lineage. Whether memory keeps its bound is asked whenever the ledger's clock ticks,
every few milliseconds. In the environment:

    SECONDS_PER_STEP=0.1     each step lasts that much longer, so that there is a middle to do something in
    WATCH=checkpoint         every file operation in that folder of the run is a labelled point: see `Points`
    DIE_AT=7                 the process kills itself just before the seventh of them
    DIE_RANK=1               under torchrun, the rank that is watched and dies, instead of rank 0
    CLOCK_JUMPS=1            the calendar's clock jumps by an hour, to and fro, at every look
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import trainer.app
from trainer.__main__ import main
from trainer.state.format import LedgerState, RunState, SaeTensors, ShardBits
from trainer.stream.buffer import Batch
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.sessions import Send
from trainer.training.leader import LeaderRun
from trainer.training.run import Run

ROWS_FILE = Path(sys.argv[1])
ROW_BYTES = 12
PACE = float(os.environ.get("SECONDS_PER_STEP", "0"))


class Recording(Run):
    """Every batch's first three numbers (shard, window, position) go into ROWS_FILE as int32."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._file = open(ROWS_FILE, "ab")  # noqa: SIM115 (open as long as the process)

    def train_step(self, batch: Batch) -> None:
        time.sleep(PACE)
        super().train_step(batch)
        self._file.write(batch.x[0][:, :3].float().numpy().astype(np.int32).tobytes())

    def state(self) -> tuple[RunState, dict[str, SaeTensors]]:
        self._file.flush()
        return super().state()

    def restore(self, state: RunState, tensors: dict[str, SaeTensors]) -> None:
        super().restore(state, tensors)
        if not state.step:
            self._file.truncate(0)


class RecordingLeaderRun(Recording, LeaderRun):
    """The same for rank 0 of many."""


def cut_on_resume() -> None:
    """Truncates ROWS_FILE to the tokens that the ledger of a checkpoint counts as trained."""
    restore = trainer.app.restore_ledger

    def restore_and_cut(ledger: Ledger, state: LedgerState, bits: dict[int, ShardBits]) -> None:
        restore(ledger, state, bits)
        if ROWS_FILE.exists():
            os.truncate(ROWS_FILE, ROW_BYTES * state.rows_trained)

    trainer.app.restore_ledger = restore_and_cut


def audit_every_tick() -> None:
    """Asks for the memory's bound at each tick of the ledger instead of once a second."""
    tick = Ledger.tick

    def audited(self: Ledger, now: float) -> list[Send]:
        sends = tick(self, now)
        for fault in self.audit(0):
            logging.getLogger("sluice.trainer").error("an invariant is broken: %s", fault)
        return sends

    Ledger.tick = audited  # type: ignore[method-assign]


class Points:
    """Numbers the file operations of each save, as Python announces them before it does them, and dies at one.

    A save begins when its temporary folder is made; on a rank other than 0, with the first file in it. The labels of
    the last save are in ROWS_FILE.points, a line each: what `DIE_AT` may name. Files written by safetensors are not
    seen being opened; their neighbours are.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.chmod", "shutil.rmtree")

    def __init__(self, folder: str, die_at: int, is_follower: bool) -> None:
        self._folder, self._die_at, self._is_follower = f"/run/{folder}", die_at, is_follower
        self._labels: list[str] = []
        self._save = ""
        self._busy = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.EVENTS or self._busy or self._folder not in str(arguments[0]):
            return
        path = str(arguments[0]).split(self._folder, 1)[1]
        save = path.split("/")[1] if "/.tmp-" in path else self._save
        if self._is_follower and save != self._save:  # rank 0 has made the folder
            self._labels, self._save = [], save
        elif event == "os.mkdir" and "/.tmp-" in path and path.count("/") == 1:
            self._labels = []
        elif not self._labels:
            return
        self._labels.append(f"{event} {Path(path).name}")
        if len(self._labels) == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._busy = True
        Path(f"{ROWS_FILE}.points").write_text("\n".join(self._labels))
        self._busy = False


def jumping_clock() -> None:
    """time.time() leaps an hour ahead and back; nothing but what people read may depend on it."""
    real, count = time.time, iter(range(sys.maxsize))
    time.time = lambda: real() + 3600.0 * (next(count) % 3 - 1)


if __name__ == "__main__":
    audit_every_tick()
    cut_on_resume()
    rank = os.environ.get("RANK", "0")
    if (watched := os.environ.get("WATCH")) and rank == os.environ.get("DIE_RANK", "0"):
        Points(watched, int(os.environ.get("DIE_AT", "0")), is_follower=rank != "0")
    if "CLOCK_JUMPS" in os.environ:
        jumping_clock()
    trainer.app.Run, trainer.app.LeaderRun = Recording, RecordingLeaderRun  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
