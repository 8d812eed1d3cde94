"""Contents of evaluation.json: the measures of one SAE of one snapshot on held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.evaluation.measures import Measure, Stage
from monitor.files import read_json
from trainer.saes.hooks import SaeHooks
from trainer.state.durable import replace_text

EVALUATION = "evaluation.json"
"""Name of the file, beside the SAE in its snapshot."""

NO_HOOKS = SaeHooks((), ())

Value = float | None | Mapping[str, float | None]
"""Value of a measure; None where it could not be computed."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures of one SAE of one snapshot. Values that an older version did not write are None, empty or missing."""

    values: Mapping[str, Value] = field(default_factory=dict)
    """Values by name of the measure (`monitor.evaluation.measures`)."""
    snapshot: str | None = None
    snapshot_tokens: int | None = None
    """Tokens trained when the snapshot was published."""
    hooks: SaeHooks = NO_HOOKS
    density: tuple[int, ...] = ()
    """Latents per bin of `trainer.report.DENSITY_EDGES` by log10 firing rate, then those that did not fire."""
    rows: int | None = None
    """Activations on which the SAE was measured."""
    predictions: int | None = None
    """Tokens whose cross-entropy was measured."""
    text_share: float | None = None
    """Share of the held-out text that was read where the time ended before; None where all of it was."""
    seconds: float | None = None
    """How long it took, together with the other SAEs of the snapshot."""

    def value(self, measure: Measure) -> Value:
        """The value of a measure; of one with labels, a dictionary."""
        value = self.values.get(measure.name)
        if measure.label:
            return value if isinstance(value, Mapping) else {}
        return None if isinstance(value, Mapping) else value

    def as_json(self) -> dict[str, Any]:
        """The object in evaluation.json, in which hooks and measures stand beside the other facts."""
        facts = {name: value for name in FACTS if (value := getattr(self, name)) is not None}
        facts["density"] = list(self.density)
        hooks = self.hooks.record() if self.hooks.reads else {}
        notes = {"ce_recovered_against": "zero ablation"} if "ce_recovered" in self.values else {}
        return {**facts, **hooks, **self.values, **notes}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Evaluation:
        """Reads evaluation.json of any version: each other number, or dictionary of numbers, is a measure's value."""
        facts = {name: value for name, kind in FACTS.items() if isinstance(value := document.get(name), kind)}
        if "density" in facts:
            facts["density"] = tuple(facts["density"])
        values = {name: value for name, value in document.items() if name not in FACTS and _is_value(value)}
        return cls(values=values, hooks=_hooks(document), **facts)


FACTS: dict[str, Any] = {
    "snapshot": str,
    "snapshot_tokens": int,
    "density": list,
    "rows": int,
    "predictions": int,
    "text_share": (int, float),
    "seconds": (int, float),
}
"""Fields of an evaluation that are keys of evaluation.json and no measures, and their type there."""


def _hooks(document: Mapping[str, Any]) -> SaeHooks:
    names = document.get("hooks")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    record = {key: document[key] for key in ("hook", "target") if isinstance(document.get(key), str)}
    return SaeHooks.from_record(record | ({"hooks": names} if is_list and "hook" in record else {}))


def _is_value(value: Any) -> bool:
    """Whether a number or None, or a dictionary of them."""
    parts = value.values() if isinstance(value, dict) else [value]
    return all(part is None or (isinstance(part, int | float) and not isinstance(part, bool)) for part in parts)


def value_of(measure: Measure, numbers: Mapping[str, Any], evaluation: Evaluation | None) -> Value:
    """The value of a measure of an SAE, of which training has reported `numbers`; None where nothing was measured."""
    if measure.stage is Stage.TRAINING:
        return numbers.get(measure.name)
    return evaluation.value(measure) if evaluation else None


def read_evaluation(snapshot: Path, sae: str) -> Evaluation | None:
    """The evaluation of an SAE in the folder of a snapshot; None where there is none yet."""
    document = read_json(snapshot / sae / EVALUATION, snapshot)
    return None if document is None else Evaluation.from_json(document)


def write_evaluation(snapshot: Path, sae: str, evaluation: Evaluation) -> None:
    """Writes evaluation.json, whole or not at all."""
    replace_text(snapshot / sae / EVALUATION, json.dumps(evaluation.as_json(), indent=1, allow_nan=False) + "\n")
