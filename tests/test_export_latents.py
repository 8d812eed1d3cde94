"""Latents in bulk, on an SAE whose latents are planted: each fires on one known word and promotes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from monitor.cli.export import main
from tests.small_reading import DENSE, VALUE, WORDS, read_run, small_model
from tests.small_run import start_run

SILENT = WORDS.index(" socket")
TURNED = 2
"""The latent whose decoder row points the other way in the newest snapshot."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose latents were measured, with the settings that its trainer would have written."""
    folder = tmp_path_factory.mktemp("latents")
    read_run(folder, small_model())
    shutil.copyfile(folder / "run.toml", folder / "run/settings.toml")
    return folder / "run"


def export(run: Path, to: Path, *options: str) -> Path:
    assert main([str(run), "--to", str(to), *options]) == 0
    return to / "planted"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_neuronpedia(run: Path, tmp_path: Path) -> None:
    """The body of its API's upload: what a latent fires on, how often, and what it promotes."""
    folder = export(run, tmp_path / "out", "--format", "neuronpedia", "--model-id", "demo", "--source-set", "res-me")

    document = read(folder / "batch-0.json")
    assert [path.name for path in folder.iterdir()] == ["batch-0.json"]
    assert (document["modelId"], document["source"], len(document["features"])) == ("demo", "0-res-me", len(WORDS) + 1)
    for index, word in enumerate(WORDS):
        feature = document["features"][index]
        promoted = feature["bottomLogits" if index == TURNED else "topLogits"]
        assert (feature["index"], promoted[0]["token"]) == (index, word)
        if index == SILENT:
            assert (feature["density"], feature["activations"]) == (0.0, [])
            continue
        for activation in feature["activations"]:
            if activation["quantileMin"] == 0.0:
                continue  # the lowest interval: no firing is so weak
            fires = [token for token, value in zip(activation["tokens"], activation["values"], strict=True) if value]
            assert set(fires) == {word} and max(activation["values"]) == pytest.approx(VALUE, rel=1e-3)


def test_intervals_hold_all_tokens(run: Path, tmp_path: Path) -> None:
    """From high to low; a latent fires with one strength here, so that the top one holds all firings."""
    folder = export(run, tmp_path / "out", "--format", "neuronpedia")
    latent = read(folder / "batch-0.json")["features"][DENSE]

    groups = {(one["quantileMin"], one["quantileMax"], one["quantileFraction"]) for one in latent["activations"]}
    (top,) = [group for group in groups if group[0] is not None]
    assert top == (
        pytest.approx(0.8 * VALUE, rel=1e-3),
        pytest.approx(VALUE, rel=1e-3),
        pytest.approx(latent["density"]),
    )


def test_saedashboard(run: Path, tmp_path: Path) -> None:
    """The two documents say the same, one with ids and titles, one with texts and numbers."""
    folder = export(run, tmp_path / "out", "--format", "saedashboard", "--sae", "planted")

    vis = read(folder / "sae_vis_data-0.json")["feature_data_dict"]["0"]
    batch = read(folder / "batch-0.json")
    feature = batch["features"][0]
    assert vis["acts_histogram_data"]["title"] == f"ACTIVATIONS<br>DENSITY = {feature['frac_nonzero']:.3%}"
    assert feature["pos_str"][0] == WORDS[0] and len(feature["pos_str"]) == len(vis["logits_table_data"]["top_logits"])
    strongest, first = vis["sequence_data"]["seq_group_data"][0], feature["activations"][0]
    assert strongest["title"] == "TOP ACTIVATIONS<br>MAX = 10.000"
    assert strongest["seq_data"][0]["feat_acts"] == first["values"]
    assert first["tokens"][first["qualifying_token_index"]] == WORDS[0]
    assert (first["bin_min"], first["bin_contains"]) == (-1.0, -1.0)
    assert feature["n_tokens_in_prompt"] == 16 and batch["layer"] == 0


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a sentence, before the language model is loaded."""
    to = ["--to", str(tmp_path / "out"), "--format", "neuronpedia"]
    assert main([str(tmp_path), *to]) == 2
    assert "holds no settings.toml: name a run directory" in capsys.readouterr().err
    assert main([str(start_run(tmp_path / "new")), *to]) == 2
    assert "has no snapshot whose latents were measured yet" in capsys.readouterr().err
    assert main([str(run), *to, "--sae", "other"]) == 2
    assert "the run's SAEs are 'planted'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--to", str(tmp_path / "out"), "--sae", "planted"])
    assert "--sae, --model-id and --source-set go with --format neuronpedia or saedashboard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
