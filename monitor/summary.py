"""summary.json: the trainer writes it at the end of a run, and the monitor adds the evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitor.evaluation.measures import Stage, measures
from monitor.evaluation.results import Evaluation, read_evaluation
from monitor.files import read_json
from monitor.snapshot_index import index_of
from trainer.state.durable import replace_text


def complete_summary(run_directory: Path) -> None:
    """Adds the newest snapshot's evaluations to the summary of a finished run; whatever else it says stays.

    The summary is of the SAEs that were trained: the evaluation of an EMA copy stays with the snapshot.
    """
    path, names = run_directory / "summary.json", index_of(run_directory).names()
    summary = read_json(path, run_directory)
    if summary is None or not names:
        return
    snapshot = run_directory / "snapshots" / names[-1]
    evaluations = {sae: read_evaluation(snapshot, sae) for sae in summary.get("saes", {})}
    complete = with_evaluations(summary, {sae: one for sae, one in evaluations.items() if one is not None})
    if complete != summary:
        replace_text(path, json.dumps(complete, indent=1) + "\n")


def with_evaluations(summary: dict[str, Any], evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """A summary to which the evaluations of its last snapshot are added, by SAE.

    Numbers that training has too get another name: `fvu` in a summary is of the text that the SAE was trained on.
    """
    saes = dict(summary.get("saes", {}))
    for sae in saes.keys() & evaluations.keys():
        values = evaluations[sae].values
        saes[sae] = saes[sae] | {name: values[key] for key, name in _summary_names().items() if key in values}
    return summary | {"saes": saes}


def is_evaluated(summary: Mapping[str, Any]) -> bool:
    """Whether any SAE of a summary has numbers of held-out text."""
    return any(sae.get(name) is not None for sae in summary["saes"].values() for name in _summary_names().values())


def _summary_names() -> dict[str, str]:
    """The key in summary.json of each measure on held-out text that is there, by the measure's name."""
    return {measure.name: measure.summary_name for measure in measures(Stage.HELD_OUT) if measure.summary_name}
