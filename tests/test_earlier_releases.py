"""Run directories that earlier releases wrote resume, load, evaluate and are served (tests/data/README.md)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file
from starlette.testclient import TestClient

from monitor.evaluation.follow import Evaluator
from monitor.http.service import make_app
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from producer.common.metrics import new_registry
from producer.common.run_file import read_run_file
from tests.small_stream import wait_for
from trainer.app import open_ledger
from trainer.control import ctl
from trainer.saes.inference import load_sae
from trainer.saes.selftest import check
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.snapshot import read_selftest, snapshot_names, verify
from trainer.state import check as check_command
from trainer.state.checkpoint import complete_folders, load_newest
from trainer.state.format import CheckpointDocument, CheckpointTensors, encode_document, encode_tensors
from trainer.stream.buffer import OrderedBuffer, ShuffleBuffer
from trainer.stream.ledger.resume import ledger_state
from trainer.training.resuming import buffer_of, roster_of
from trainer.training.run import Run

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
RUNS = {"stopped": "run.toml", "deterministic": "deterministic.toml"}
"""Run directories by name, and the file that each was started with."""


@pytest.fixture(params=sorted(path.name for path in DATA.glob("format-*")))
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a release wrote, as the working directory: its settings have relative paths."""
    shutil.copytree(DATA / request.param, tmp_path / "release")
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"


@pytest.mark.parametrize("name", RUNS)
def test_its_checkpoint_is_read_and_written_again_as_it_was(release: Path, name: str) -> None:
    """Every key and every bit: through the typed parts, and through the objects that take them."""
    (folder,) = complete_folders(release / "runs" / name / "checkpoint")
    document, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
    document |= {"format": 6, "blocks": 1, "latents": {}}  # what later versions have added
    ledger_parts = {"newest_revision": "", "newest_revision_number": 0, "revision_bounds": {}}
    document["roster"]["forgotten_hooks"] = []
    document["ledger"] |= {"trained_by_corpus": {}, "trained_by_revision": {}} | ledger_parts
    document["ledger"]["stream"] |= {"revision": "", "revision_number": 0, "corpora": []}
    document["ledger"]["open"] = [shard | {"revision": ""} for shard in document["ledger"]["open"]]
    document["saes"] = {name: sae | {"planned_tokens": None} for name, sae in document["saes"].items()}
    settings = read_run_file(TrainerSettings, release / RUNS[name], [])
    checkpoint = load_newest(release / "runs" / name)
    assert checkpoint is not None and checkpoint.document.ledger.stream is not None
    assert encode_document(checkpoint.document) == document
    encoded = encode_tensors(checkpoint.tensors)
    assert encoded.keys() == tensors.keys()

    roster = roster_of(checkpoint.document, settings)
    run = Run(settings, checkpoint.document.ledger.stream, roster)
    run.restore(checkpoint.document.run, checkpoint.tensors.saes)
    ledger = open_ledger(settings, checkpoint)
    buffer = (OrderedBuffer if settings.run.deterministic else ShuffleBuffer)(1024, [8, 8], torch.float32, 1)
    buffer.restore(buffer_of(checkpoint, settings))

    counters, saes = run.state()
    books, bits = ledger_state(ledger)
    for member in document["roster"]["members"]:  # settings that are new, at their defaults
        keys = SaeSettings.model_of(member["settings"]).model_fields.keys()
        new: dict[str, Any] = {"optimizer": "adam", "anneal_tokens": 0}
        member["settings"] |= {key: value for key, value in new.items() if key in keys}
    restored = CheckpointDocument(counters, roster.state(), books, buffer.state().random)
    assert encode_document(restored) == document
    again = encode_tensors(CheckpointTensors(saes, bits, buffer.state().names))
    for key, value in tensors.items():
        assert torch.equal(torch.as_tensor(encoded[key]), value), key
        assert torch.equal(torch.as_tensor(again[key]), value), key


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_its_run_goes_on_and_ends(release: Path, name: str) -> None:
    """With the run file that it was started with; the deterministic one was paused. The directory is whole after it."""
    directory = release / "runs" / name
    saved = load_newest(directory)
    assert saved is not None
    words = [RUNS[name], f"run.directory=runs/{name}", f"run.tokens={saved.tokens + 3000}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with open(release / "log", "w") as log:
        trainer, producer = (
            subprocess.Popen([sys.executable, "-m", package, *words], cwd=release, env=environment, stderr=log)
            for package in ("trainer", "producer")
        )
        try:
            if saved.document.roster.paused:
                wait_for(lambda: ctl.main([str(directory), "resume"]) == 0, 60)
            assert trainer.wait(120) == 0, (release / "log").read_text()
            assert producer.wait(120) == 0
        finally:
            trainer.kill(), producer.kill()

    summary = json.loads((directory / "summary.json").read_text())
    assert summary["tokens"] == saved.tokens + 3000
    assert summary["saes"].keys() == saved.document.run.saes.keys()
    assert all(0 < sae["fvu"] < 0.6 for sae in summary["saes"].values())
    assert check_command.main([str(directory)]) == 0


def test_its_snapshots_load_and_do_what_they_did(release: Path) -> None:
    """Each SAE's latents and reconstruction of its self-test, as the release computed them."""
    for name in RUNS:
        directory = release / "runs" / name
        assert snapshot_names(directory)
        for snapshot in snapshot_names(directory):
            for sae in verify(directory / "snapshots" / snapshot).saes:
                folder = directory / "snapshots" / snapshot / sae
                check(folder)
                loaded, expected = load_sae(folder), read_selftest(folder)
                latents = loaded.encode(torch.from_numpy(expected["x"]))
                torch.testing.assert_close(latents, torch.from_numpy(expected["latents"]), rtol=1e-4, atol=1e-4)


def test_its_snapshots_are_evaluated_to_the_same_numbers(release: Path) -> None:
    """Those of its evaluation.json, on the same held-out text and language model."""
    directory = release / "runs" / "stopped"
    snapshot = directory / "snapshots" / snapshot_names(directory)[-1]
    paths = [snapshot / sae / "evaluation.json" for sae in ("topk", "tied", "crosscoder")]
    before = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    settings = read_run_file(MonitorSettings, release / "run.toml", [])
    Evaluator(settings, MonitorMetrics(CollectorRegistry()), threading.Event()).look()

    for path, earlier in zip(paths, before, strict=True):
        now = json.loads(path.read_text())
        assert {key: now[key] for key in ("ce_clean", "ce_sae", "ce_delta", "kl", "fvu", "l0")} == pytest.approx(
            {key: earlier[key] for key in ("ce_clean", "ce_sae", "ce_delta", "kl", "fvu", "l0")}, rel=1e-3, abs=1e-4
        )
        assert earlier.keys() <= now.keys()


def test_its_run_directory_is_served(release: Path) -> None:
    """The run, its snapshots with their evaluations, files, history and the page."""
    directory = release / "runs" / "stopped"
    newest = snapshot_names(directory)[-1]
    client = TestClient(make_app(directory, new_registry()))

    assert client.get("/readyz").status_code == 200
    run = client.get("/v1/run").json()
    assert (run["state"], run["latest"]) == ("running", newest)
    page = client.get("/").text
    assert all(sae in page for sae in client.get(f"/v1/snapshots/{newest}/manifest.json").json()["saes"])
    assert client.get(f"/v1/snapshots/{newest}/topk/evaluation.json").json()["ce_delta"] is not None
    assert client.get(f"/v1/snapshots/{newest}/topk/sae_weights.safetensors").status_code == 200
    assert client.get("/v1/history").json()
