"""How a run is started that an estimate describes: ranks, machines, producers, intakes, and their command lines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from producer.common.formatting import format_bytes
from producer.common.shell import shell_command
from trainer.parallel.placement import world_fault
from trainer.settings import TrainerSettings

INTAKE_BYTES, INTAKE_BYTES_WITH_KEYS = 1.9e9, 0.8e9
"""Bytes per second that one intake takes, without keys and with: one ZeroMQ socket, measured on two CPU cores."""
DISK_BYTES = 2e9
"""Bytes per second that a rank writes of a checkpoint; assumed."""
LEAST_SHUTDOWN_SECONDS = 300
"""torchrun's patience at least: it kills ranks that write a checkpoint for longer."""


@dataclass(frozen=True)
class Start:
    """What a user starts, and what the stream allows."""

    ranks: int
    machines: int
    intakes: int
    """Needed to feed the trainer at its full rate."""
    intake_rate: float
    """Tokens per second that the intakes of the run file take."""
    producers: int | None
    """Each on a device of its own; None when the size of the language model is unknown."""
    trainer: str
    """The command, on each machine."""
    producer: str
    stream_bytes: float | None
    """That cross the wire in all; None for a run without an end."""
    checkpoint_seconds: float
    """In which training stands still, for each checkpoint."""
    fault: str | None
    """Why the run file as it stands is refused with so many ranks."""

    @classmethod
    def of(
        cls,
        settings: TrainerSettings,
        run_file: Path,
        ranks: int,
        per_machine: int,
        rate: float,
        token_bytes: int,
        producers: float | None,
        checkpoint_bytes: float,
    ) -> Start:
        """`rate` of the trainer in tokens/s; `producers` that balance it."""
        machines = -(-ranks // per_machine)
        intake_bytes = INTAKE_BYTES if settings.stream.keys is None else INTAKE_BYTES_WITH_KEYS
        intake_rate = settings.parallel.intakes * intake_bytes / token_bytes
        checkpoint_seconds = checkpoint_bytes / ranks / DISK_BYTES
        patience = max(LEAST_SHUTDOWN_SECONDS, 60 * math.ceil(checkpoint_seconds / 30))
        if ranks == 1:
            trainer = shell_command("trainer", str(run_file))
        else:
            meeting = "--standalone" if machines == 1 else f"--nnodes {machines} --rdzv-endpoint HOST:29500"
            each = -(-ranks // machines)
            trainer = f"torchrun {meeting} --nproc-per-node {each} --shutdown-timeout {patience} -m trainer {run_file}"
        needed = None if producers is None else max(1, math.ceil(producers * min(1.0, intake_rate / rate)))
        tokens = settings.run.tokens
        return cls(
            ranks=ranks,
            machines=machines,
            intakes=math.ceil(rate * token_bytes / intake_bytes),
            intake_rate=intake_rate,
            producers=needed,
            trainer=trainer,
            producer=shell_command("producer", str(run_file)),
            stream_bytes=None if tokens is None else float(tokens * token_bytes),
            checkpoint_seconds=checkpoint_seconds,
            fault=world_fault(settings, ranks),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table."""
        where = "" if self.machines == 1 else f", on each of {self.machines} machines"
        producers = "producers" if self.producers is None else f"{self.producers} × producer"
        rows = [(f"{self.ranks} rank{'s' * (self.ranks > 1)}{where}", self.trainer), (producers, self.producer)]
        if self.stream_bytes is not None:
            rows.append(("through the stream in all", f"{format_bytes(self.stream_bytes)}, none of it stored"))
        if self.checkpoint_seconds >= 1:
            rows.append(("a checkpoint holds training up for", f"{self.checkpoint_seconds:,.0f} s"))
        return rows

    def sentences(self, rate: float) -> list[str]:
        """What keeps the run from starting, or from its full rate."""
        sentences = [] if self.fault is None else [f"As the file stands, {self.ranks} ranks are refused: {self.fault}."]
        if self.intake_rate < rate:
            sentences.append(
                f"One intake takes {self.intake_rate:,.0f} tokens/s of these activations, and the trainer "
                f"{rate:,.0f}: the stream bounds the run; {self.intakes} intakes would feed it."
            )
        return sentences
