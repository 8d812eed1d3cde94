"""CONTRACT: the hooks that an SAE reads and writes, by name.

    autoencoder   reads A         writes A         in messages `A`
    crosscoder    reads A and B   writes A and B               `A + B`
    transcoder    reads A         writes B                     `A → B`

Settings name them, training takes their rows from the stream, cfg.json and the manifest record them, and evaluation
puts reconstructions in their place: all of them ask here. Light: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.saes.settings import SaeSettings


@dataclass(frozen=True)
class SaeHooks:
    """The hooks an SAE reads, in the order of its input, and those it writes, in the order of its output."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    """Those it reads, or the one that a transcoder reconstructs."""

    @classmethod
    def from_settings(cls, settings: SaeSettings, streamed: Sequence[str]) -> SaeHooks:
        """Hooks of [[sae]]; the first of `streamed` where it names none."""
        reads = tuple(settings.hooks or [settings.hook or streamed[0]])
        return cls(reads, reads if settings.target is None else (settings.target,))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> SaeHooks:
        """Hooks in the `metadata` of a cfg.json, whose keys are SAELens'; none where they are not recorded."""
        names = metadata.get("hook_names") or [metadata.get("hook_name")]
        reads = tuple(str(name) for name in names if name is not None)
        target = metadata.get("hook_name_out")
        return cls(reads, reads if target is None else (str(target),))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SaeHooks:
        """Hooks in the numbers of an SAE; see `record`."""
        reads = tuple(record.get("hooks") or ([record["hook"]] if record.get("hook") is not None else []))
        return cls(reads, (record["target"],) if record.get("target") else reads)

    def record(self) -> dict[str, Any]:
        """Keys of a manifest, a summary and an evaluation: hook, a crosscoder's hooks, a transcoder's target."""
        record: dict[str, Any] = {"hook": self.reads[0]}
        if self.is_crosscoder:
            record["hooks"] = list(self.reads)
        if self.is_transcoder:
            record["target"] = self.writes[0]
        return record

    @property
    def is_transcoder(self) -> bool:
        """It reconstructs another hook than it reads."""
        return self.writes != self.reads

    @property
    def is_crosscoder(self) -> bool:
        """It reads several hooks."""
        return len(self.reads) > 1

    @property
    def names(self) -> frozenset[str]:
        """All hooks whose rows training needs."""
        return frozenset(self.reads) | frozenset(self.writes)

    def __str__(self) -> str:
        reads = " + ".join(self.reads)
        return f"{reads} → {self.writes[0]}" if self.is_transcoder else reads
