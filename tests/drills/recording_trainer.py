"""The real trainer, which also writes down the content of every row it trains on.

    python tests/drills/recording_trainer.py ROWS_FILE RUN.toml [section.key=value …]

With the synthetic source's `naming`, a row's content is its name, so ROWS_FILE tells which rows were trained, in
which order. Its length is part of each checkpoint: what a killed trainer wrote after its last checkpoint is cut off
when the next one resumes, so that the file always holds the surviving lineage. SECONDS_PER_STEP in the environment
makes each step last that long, so that a test can do something in the middle of a short run.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import trainer.train
from trainer.__main__ import main
from trainer.buffer import Batch
from trainer.run import Run

ROWS_FILE = Path(sys.argv[1])
PACE = float(os.environ.get("SECONDS_PER_STEP", "0"))


class RecordingRun(Run):
    """Every batch's first three numbers (shard, window, position) go into ROWS_FILE as int32."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._file = open(ROWS_FILE, "ab")  # noqa: SIM115 (open as long as the process)

    def learn(self, batch: Batch) -> None:
        time.sleep(PACE)
        super().learn(batch)
        self._file.write(batch.x[0][:, :3].numpy().astype(np.int32).tobytes())

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self._file.flush()
        document, tensors = super().state()
        return document | {"rows_file": ROWS_FILE.stat().st_size}, tensors

    def restore(self, document: dict[str, Any], tensors: dict[str, Any]) -> None:
        super().restore(document, tensors)
        self._file.truncate(document.get("rows_file", 0))


if __name__ == "__main__":
    trainer.train.Run = RecordingRun  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
