"""SAELens, the real one, loads our snapshots and agrees with us. Run by `make peers`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from producer.activations import load_language_model
from producer.corpus import open_corpus
from producer.settings import CorpusSettings, ModelSettings
from producer.tokens import windows_of
from trainer.saes.inference import check, export, load_sae
from trainer.settings import OptimizerSettings, SaeSettings
from trainer.snapshot import publish
from trainer.trainee import Trainee

ROOT = Path(__file__).parent.parent.parent
PEERS = os.environ.get("SLUICE_PEERS_PYTHON")
HOOK = "blocks.1.hook_resid_post"

pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PEERS is None, reason="SLUICE_PEERS_PYTHON names no environment; run `make peers`"),
]


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """Raw activations of the demo LM on held-out text, [rows, 256]."""
    settings = CorpusSettings(kind="stdlib")
    model = load_language_model(
        ModelSettings(name=str(ROOT / "producer/demo_lm"), hooks=[HOOK], device="cpu", dtype="float32")
    )
    corpus = open_corpus(settings)
    windows = windows_of(corpus.documents(corpus.held_out_shards[0]), model.tokenizer, settings)
    (x,) = model.activations(torch.from_numpy(windows.ids[:32]))
    return x[torch.from_numpy(windows.kept[:32])].clone()


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_saelens_encodes_and_decodes_as_we_do(architecture: str, activations: torch.Tensor, tmp_path: Path) -> None:
    """Loaded with nothing of ours installed: latents and reconstructions agree to 1e-5, provenance survives."""
    options = {"k": 16} if architecture == "topk" else {"target_l0": 16.0}
    settings = SaeSettings(name="sae", architecture=architecture, d_sae=1024, **options)
    optimizer = OptimizerSettings(learning_rate=3e-3, warmup_tokens=0)
    trainee = Trainee(settings, optimizer, 256, 0, torch.device("cpu"), torch.float32)
    scale = float((256 / activations.square().sum(1).mean()).sqrt())
    trainee.initialise(activations * scale, torch.Generator().manual_seed(0))
    for step in range(20):
        trainee.step(activations[torch.randint(len(activations), (512,))] * scale, 512 * step, None)
    metadata = {"hook_name": HOOK, "model_name": "producer/demo_lm", "context_size": 256, "trained_with": "sluice"}
    exported = export(trainee.sae, scale, trainee.statistics.firing_rate(), activations, metadata, {})
    folder = publish(tmp_path, 10_240, [exported], {"id": "peers"}, check) / "sae"

    x = activations[:2000]
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [str(PEERS), str(Path(__file__).parent / "saelens_encode.py")]
    paths = [str(folder), str(tmp_path / "x.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs, told = load_file(tmp_path / "out.safetensors"), json.loads(done.stdout.splitlines()[-1])
    ours = load_sae(folder)
    latents = ours.encode(x)

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    assert difference(theirs["latents"], latents) < 1e-5
    assert difference(theirs["x_hat"], ours.decode(latents)) < 1e-5
    assert difference(theirs["folded"], ours.decode(latents)) < 1e-5
    assert {
        "architecture": architecture,
        "hook_name": HOOK,
        "model_name": "producer/demo_lm",
        "context_size": 256,
        "trained_with": "sluice",
    } == told
