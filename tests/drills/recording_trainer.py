"""The real trainer, which also writes down the content of every row it trains on.

    python tests/drills/recording_trainer.py ROWS_FILE RUN.toml [section.key=value …]

With the synthetic source's `naming`, a row's content is its name, so ROWS_FILE tells which rows were trained, in
which order. Its length is part of each checkpoint: what a killed trainer wrote after its last checkpoint is cut off
when the next one resumes, so that the file always holds the surviving lineage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import trainer.train
from trainer.__main__ import main
from trainer.buffer import Batch

ROWS_FILE = Path(sys.argv[1])


class RecordingRun(trainer.train.Run):
    """Every batch's first three numbers (shard, window, position) go into ROWS_FILE as int32."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._file = open(ROWS_FILE, "ab")  # noqa: SIM115 (open as long as the process)
        if not (Path(self.settings.run.directory) / "checkpoint").exists():
            self._file.truncate(0)

    def learn(self, batch: Batch) -> None:
        super().learn(batch)
        self._file.write(batch.x[0][:, :3].numpy().astype(np.int32).tobytes())

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self._file.flush()
        document, tensors = super().state()
        return document | {"rows_file": ROWS_FILE.stat().st_size}, tensors

    def restore(self, document: dict[str, Any], tensors: dict[str, Any]) -> None:
        super().restore(document, tensors)
        self._file.truncate(document["rows_file"])


if __name__ == "__main__":
    trainer.train.Run = RecordingRun  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
