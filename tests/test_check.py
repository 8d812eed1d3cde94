"""`python -m trainer check`: a run that was interrupted, whole and damaged in every way that we know of."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drills.scene import Scene
from trainer.__main__ import main
from trainer.snapshot import snapshot_names
from trainer.state.checkpoint import complete_folders


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that real processes left in the middle of the run, shards open."""
    with Scene(tmp_path_factory.mktemp("scene"), "snapshots.every_tokens=8000") as scene:
        trainer, _ = scene.trainer(SECONDS_PER_STEP=0.02), scene.producer()
        scene.wait_for_rows(20_000)
        trainer.terminate()
        assert trainer.wait(120) == 0
    return scene.run


@pytest.fixture
def directory(interrupted: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(interrupted, tmp_path / "run", ignore=shutil.ignore_patterns("ctl"))
    settings = tmp_path / "run" / "settings.toml"
    settings.write_text(settings.read_text().replace(str(interrupted), str(tmp_path / "run")))
    return tmp_path / "run"


def run_check(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, findings, faults)"""
    before = sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*"))
    code = main(["check", str(directory)])
    assert sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*")) == before, "it changed something"
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def newest(directory: Path) -> Path:
    return complete_folders(directory / "checkpoint")[-1]


def snapshot(directory: Path) -> Path:
    return directory / "snapshots" / snapshot_names(directory)[-1]


def rewritten(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """The newest checkpoint with other contents and right hashes, as a fault of Sluice itself would leave it."""

    def damage(directory: Path) -> None:
        folder = newest(directory)
        document, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
        change(document, tensors)
        (folder / "state.json").write_text(json.dumps(document))
        save_file(tensors, folder / "state.safetensors")
        files = {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            }
            for name in ("state.json", "state.safetensors")
        }
        (folder / "complete.json").write_text(json.dumps(files))

    return damage


def test_a_sound_run_is_told_to_be_one(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0, every part by name, and what a resume would do."""
    code, findings, faults = run_check(directory, capsys)

    assert (code, faults) == (0, "")
    assert "hashes right" in findings and "hashes and self-tests right" in findings and "reports" in findings
    assert "a resume would go on with run" in findings
    assert "shards that were begun are leased again" in findings


def test_what_a_resume_would_do_is_told(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A complete run stays complete; without a checkpoint nothing begins among snapshots, and anew without any."""
    (directory / "summary.json").write_text("{}")
    assert "the run is complete" in run_check(directory, capsys)[1]
    shutil.rmtree(directory / "checkpoint")
    code, findings, faults = run_check(directory, capsys)
    assert code == 1 and "a start would refuse" in findings and "no checkpoint to go on from" in faults
    shutil.rmtree(directory / "snapshots")
    (directory / "summary.json").unlink()
    assert "would begin the run anew" in run_check(directory, capsys)[1]


def test_snapshots_that_a_start_would_move_away_are_told(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint is gone, and the one before it is older than the newest snapshot."""
    shutil.copytree(snapshot(directory), directory / "snapshots" / "000000900000")
    (directory / "snapshots" / "LATEST").write_text("000000900000\n")

    assert "would move to snapshots/superseded unless pinned: 000000900000" in run_check(directory, capsys)[1]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_weights(directory: Path) -> None:
    """A snapshot whose weights and hashes agree, and whose self-test does not."""
    path = snapshot(directory) / "topk" / "sae_weights.safetensors"
    weights = load_file(path)
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, path)
    manifest_path = snapshot(directory) / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    for entry in manifest["files"]:
        changed = snapshot(directory) / entry["path"]
        entry |= {"bytes": changed.stat().st_size, "sha256": hashlib.sha256(changed.read_bytes()).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))


def count(name: str, by: int) -> Callable[[Path], None]:
    return rewritten(lambda document, _: document["ledger"].update({name: document["ledger"][name] + by}))


def open_twice(document: dict[str, Any], _: object) -> None:
    document["ledger"]["open"] += document["ledger"]["open"][:1]


def lose_bits(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.startswith("ledger/") and name.endswith("trained"))]


def train_outliers(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("ledger/")]:
        tensors[name] = torch.full_like(tensors[name], 255)


def make_nan(_: object, tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")


def rename_sae(directory: Path) -> None:
    settings = directory / "settings.toml"
    settings.write_text(settings.read_text().replace('name = "topk"', 'name = "other"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: flip_a_bit(newest(run) / "state.safetensors"), "state.safetensors is damaged"),
        (lambda run: (newest(run) / "state.json").unlink(), "state.json is missing"),
        (lambda run: (newest(run) / "complete.json").write_text("{"), "complete.json is damaged"),
        (rewritten(lambda document, _: document.update(format=99)), "has format 99, this version reads"),
        (count("rows_trained", 256), "its name says otherwise"),
        (count("finished_in_epoch", 1), "shards, and knows of"),
        (count("cursor", -1), "shards, and knows of"),
        (count("next_serial", -1000), "was never given out"),
        (rewritten(lambda document, _: document["ledger"].update(breaches={"trained_once": 2})), "breaches"),
        (rewritten(open_twice), "two open shards have the same serial"),
        (rewritten(lose_bits), "bits are missing"),
        (rewritten(train_outliers), "trained and discarded at once"),
        (rewritten(make_nan), "NaN"),
        (lambda run: flip_a_bit(snapshot(run) / "topk" / "sae_weights.safetensors"), "differs from the manifest"),
        (lambda run: (snapshot(run) / "topk" / "cfg.json").unlink(), "is missing"),
        (other_weights, "self-test"),
        (lambda run: (run / "snapshots" / "LATEST").write_text("000000000000\n"), "LATEST names 000000000000"),
        (lambda run: (run / "metrics.jsonl").write_text('{"time": 1}\n{"ti\n{}\n'), "the first is line 2"),
        (lambda run: (run / "settings.toml").write_text("[run"), "is not valid TOML"),
        (rename_sae, "settings.toml and the checkpoint disagree"),
        (rewritten(lambda document, _: document["ledger"].update(run="other")), "the checkpoint of run other and snap"),
        (lambda run: (run / "lock").unlink() or (run / "lock").mkdir(), "lock cannot be opened"),
    ],
)
def test_damage_is_found_and_named(
    directory: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    """1, and a sentence for what is wrong."""
    damage(directory)
    code, _, faults = run_check(directory, capsys)

    assert code == 1
    assert message in faults
    assert all(line.startswith("fault: ") for line in faults.splitlines() if line)


def test_a_resume_that_would_be_refused_is_told(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason that the trainer would give."""
    flip_a_bit(newest(directory) / "state.safetensors")

    assert "a resume would refuse" in run_check(directory, capsys)[1]


@pytest.mark.parametrize("damage", [count("cursor", -1), rewritten(train_outliers)])
def test_a_ledger_that_does_not_balance_is_not_resumed(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    """What `check` faults, the trainer refuses: it would train tokens twice, or never."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    damage(directory)

    assert main([str(directory / "settings.toml")]) == 1
    assert "does not balance: ledger: " in caplog.text and "Traceback" not in caplog.text


def test_what_is_no_run_directory_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty folder, and one that does not exist."""
    for path in (tmp_path, tmp_path / "nothing"):
        code, _, faults = run_check(path, capsys)
        assert code == 1
        assert "is no run directory" in faults
