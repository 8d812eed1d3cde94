"""Snapshots on the Hugging Face hub: what is uploaded, by huggingface_hub to a hub on loopback, and the model card."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monitor.cli.publish import main
from monitor.evaluation.results import Evaluation, write_evaluation
from tests.small_hub import TOKEN, Hub, running_hub
from tests.small_run import identity_sae, publish_snapshot
from trainer.saes.description import equations_of
from trainer.saes.registry import names
from trainer.snapshot import SAELENS_LAYOUT, read_manifest, verify

SETTINGS = {
    "run": {"directory": "/home/me/run"},
    "model": {"name": "tiny"},
    "sae": [{"name": "small", "d_sae": 8}, {"name": "other", "d_sae": 8}],
    "stream": {"keys": "/home/me/keys"},
}

SAELENS_KEYS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"hook_name": "blocks.0.hook_resid_post", "sae_lens_version": SAELENS_LAYOUT},
}
"""Keys that a trainer writes and the small SAE lacks."""


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Two SAEs, of which one is evaluated."""
    saes = [identity_sae("small"), identity_sae("other")]
    stream = {"model": "tiny", "corpus": "three files", "corpus_fingerprint": "f00d", "context": 16}
    snapshot = publish_snapshot(tmp_path / "run", 1_500_000, saes, id="run-1", settings=SETTINGS, stream=stream)
    write_evaluation(snapshot, "small", Evaluation(values={"ce_delta": 0.125}, snapshot_tokens=1_500_000))
    (snapshot / "small/latents.safetensors").write_bytes(b"held-out text")
    return snapshot


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own, and to which it is logged in."""
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_snapshot_is_uploaded(snapshot: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """In one commit: its files, the evaluation, a card; text that it was measured on stays here."""
    assert main([str(snapshot), "someone/saes", "--private"]) == 0

    assert capsys.readouterr().out == f"{hub.url}/someone/saes\n"
    files = hub.repositories["someone/saes"]
    of_sae = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "selftest.safetensors"}
    of_saes = {f"{sae}/{file}" for sae in ("small", "other") for file in of_sae}
    assert set(files) == {"README.md", "manifest.json", "small/evaluation.json", *of_saes}
    weights = (snapshot / "small/sae_weights.safetensors").read_bytes()
    assert files["small/sae_weights.safetensors"] == weights and len(hub.blobs) > 0
    assert (hub.private, hub.messages) == ({"someone/saes"}, ["Snapshot 000001500000"])


def test_a_run_directory_stands_for_its_newest_snapshot(snapshot: Path, hub: Hub) -> None:
    """And a repository that exists gets another commit."""
    publish_snapshot(snapshot.parents[1], 2_000_000)
    for path in (snapshot, snapshot.parents[1]):
        assert main([str(path), "someone/saes"]) == 0

    assert hub.messages == ["Snapshot 000001500000", "Snapshot 000002000000"]


def test_a_dry_run_writes_the_folder(snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, and it is a snapshot like any other, with the SAEs that were asked for."""
    to = tmp_path / "out"
    assert main([str(snapshot), "someone/saes", "--sae", "small", "--dry-run", "--to", str(to)]) == 0

    assert list(verify(to).saes) == ["small"] and not (to / "other").exists()
    assert f"{to} is what would be uploaded to someone/saes:\n  README.md" in capsys.readouterr().out
    settings = read_manifest(to).run["settings"]
    assert settings == {"model": {"name": "tiny"}, "sae": [{"name": "small", "d_sae": 8}]}
    assert "/home/me" not in json.dumps(read_manifest(to).run)


def test_the_card_says_what_the_saes_are(snapshot: Path, tmp_path: Path) -> None:
    """How to load them, numbers with their meaning, equations, where they come from, settings."""
    to = tmp_path / "out"
    assert main([str(snapshot), "someone/saes", "--dry-run", "--license", "apache-2.0", "--to", str(to)]) == 0

    head, card = (to / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert {"library_name: saelens", "license: apache-2.0", "- sparse-autoencoder"} <= set(head.splitlines())
    for line in (
        'sae = SAE.from_pretrained("someone/saes", "small")',
        "| `small` | blocks.0.hook_resid_post | blocks.0.hook_resid_post | jumprelu | 4 | 8 |",
        "| FVU | training | lower | 0.2500 | 0.2500 |",
        "| ΔCE | held-out | lower | 0.1250 | – |",
        "latents  = jumprelu(pre_acts)",
        "jumprelu: z where z exceeds a threshold of the latent, 0 elsewhere.",
        "| tokens trained | 1,500,000 |",
        "| text, fingerprint | f00d |",
        "[model]",
    ):
        assert line in card.splitlines(), line
    assert "2 sparse autoencoders of `tiny`, trained on 1.5 M tokens" in card


@pytest.mark.peers
@pytest.mark.timeout(600)
def test_saelens_loads_what_was_published(snapshot: Path, hub: Hub, tmp_path: Path) -> None:
    """By the lines of the card, in its own environment, from the hub."""
    python = os.environ.get("SLUICE_PEERS_PYTHON")
    if python is None:
        pytest.skip("SLUICE_PEERS_PYTHON names no environment; run `make peers`")
    saes = [replace(sae, cfg=sae.cfg | SAELENS_KEYS) for sae in (identity_sae("small"),)]
    published = publish_snapshot(tmp_path / "published", 1000, saes, id="run-2")
    assert main([str(published), "someone/saes"]) == 0

    card = hub.repositories["someone/saes"]["README.md"].decode()
    block = card.partition("```python\n")[2].partition("```")[0]
    code = f"import torch\nactivations = torch.tensor([[1.0, -2.0, 0.0, 3.0]])\n{block}\nprint(latents.tolist())"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.splitlines()[-1] == "[[1.0, 0.0, 0.0, 3.0, 0.0, 2.0, 0.0, 0.0]]"


@pytest.mark.parametrize("architecture", names())
def test_every_architecture_has_equations(architecture: str) -> None:
    """From the docstring of its module: the paper, the latents, the loss."""
    cfg = {"architecture": "standard", "metadata": {"training_architecture": architecture}}
    equations = equations_of(cfg, frozenset({"W_skip"}))

    assert equations.training is not None
    assert re.search("latents(_i)? = ", equations.training_equations) and "L = " in equations.training_equations
    assert equations.inference.splitlines() == [
        "pre_acts = (x − b_dec) W_enc + b_enc",
        "latents  = relu(pre_acts)",
        "x_hat    = latents W_dec + b_dec + x W_skipᵀ",
    ]


def test_what_the_hub_refuses_is_said(
    snapshot: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a sentence, with what to do."""
    assert main([str(snapshot), "others/saes"]) == 1
    assert "does not let this token write to others/saes" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main([str(snapshot), "someone/saes"]) == 1
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main([str(snapshot), "someone/saes"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_what_is_no_snapshot_is_said(snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and nothing is written or uploaded."""
    to = tmp_path / "out"
    for arguments, sentence in (
        ([str(tmp_path)], f"{tmp_path} is no snapshot (manifest.json)"),
        ([str(snapshot / "small")], f"publish {snapshot}, with --sae small"),
        ([str(snapshot), "--sae", "none"], "the snapshot has no SAE 'none'; it has small, other"),
    ):
        path, *options = arguments
        assert main([path, "someone/saes", *options, "--dry-run", "--to", str(to)]) == 2
        assert sentence in capsys.readouterr().err
    assert main([str(snapshot), "saes", "--dry-run", "--to", str(to)]) == 2
    assert "expected OWNER/NAME, such as someone/gpt2-saes" in capsys.readouterr().err
    (snapshot / "small/sae_weights.safetensors").write_bytes(b"damaged")
    assert main([str(snapshot), "someone/saes", "--dry-run", "--to", str(to)]) == 2
    assert "differs from the manifest" in capsys.readouterr().err
    assert not to.exists()
