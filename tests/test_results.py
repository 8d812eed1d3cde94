"""evaluation.json: what is written is read, whichever version wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monitor.evaluation.measures import MEASURES, Stage, get, measures
from monitor.evaluation.results import Evaluation, read_evaluation, write_evaluation
from tests.small_run import publish_snapshot
from trainer.saes.hooks import SaeHooks

TRANSCODER = """
{
 "snapshot": "000000001000", "snapshot_tokens": 1000,
 "hook": "blocks.1.hook_resid_mid", "target": "blocks.1.hook_mlp_out",
 "ce_clean": 3.25, "ce_sae": 3.5, "ce_zero": 5.0, "ce_mean_ablation": 4.0, "ce_delta": 0.25, "ce_recovered": 0.857,
 "ce_recovered_mean_ablation": null, "kl": 0.2, "fvu": 0.125, "l0": 32.0,
 "ce_recovered_against": "zero ablation", "density": [0, 3, 1], "dead_latents": 1, "rows": 4096, "predictions": 4000,
 "seconds": 3, "explanation_f1": 0.5, "probe_accuracy": {"1": 0.75, "dense": 0.9}
}
"""
"""As it was written before `Evaluation` was, and before some of today's measures."""


def test_a_file_of_an_older_version_is_read_and_written_unchanged() -> None:
    """Facts, hooks and measures; a measure that it lacks has no value."""
    document = json.loads(TRANSCODER)
    evaluation = Evaluation.from_json(document)
    assert evaluation.hooks == SaeHooks(("blocks.1.hook_resid_mid",), ("blocks.1.hook_mlp_out",))
    assert (evaluation.snapshot_tokens, evaluation.density, evaluation.rows) == (1000, (0, 3, 1), 4096)
    assert evaluation.value(get("ce_delta", Stage.HELD_OUT)) == 0.25
    assert evaluation.value(get("cosine", Stage.HELD_OUT)) is None
    assert evaluation.value(get("probe_accuracy", Stage.HELD_OUT)) == {"1": 0.75, "dense": 0.9}
    assert evaluation.as_json() == document


def test_all_values_come_back(tmp_path: Path) -> None:
    """Of a crosscoder that has every measure, through the file."""
    values = {measure.name: {"some": 0.5} if measure.label else 0.25 for measure in measures(Stage.HELD_OUT)}
    hooks = SaeHooks(("a", "b"), ("a", "b"))
    evaluation = Evaluation(values=values, hooks=hooks, snapshot="000000001000", snapshot_tokens=1000, seconds=0.5)
    folder = publish_snapshot(tmp_path, 1000)
    assert read_evaluation(folder, "small") is None
    write_evaluation(folder, "small", evaluation)
    assert read_evaluation(folder, "small") == evaluation


@pytest.mark.parametrize("name", ["snapshot", "snapshot_tokens", "hook", "hooks", "density", "rows", "seconds", "fvu"])
@pytest.mark.parametrize("value", ["text", 5.5, [{}], {"a": []}, True, None])
def test_a_value_of_another_type_counts_as_missing(name: str, value: object) -> None:
    """Whoever wrote it, no page and no metric stumbles over it."""
    evaluation = Evaluation.from_json({"kl": 0.5, "hook": "a", name: value})
    assert evaluation.value(get("kl", Stage.HELD_OUT)) == 0.5
    assert all(isinstance(evaluation.value(measure), float | dict | None) for measure in MEASURES)
    json.dumps(evaluation.as_json())
