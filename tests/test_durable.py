"""A power cut at any moment leaves the old or the new: never half of one, and never less than was promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from monitor.cli.client import Monitor
from monitor.cli.download import pull
from monitor.evaluation.latents.activations import LatentActivations, load_latents
from monitor.http.service import make_app, start_service
from producer.common.metrics import new_registry
from producer.keys import write_keys
from tests.small_disk import OUTCOMES, Disk, Tree, record_changes, write
from tests.small_run import publish_snapshot, small_checkpoint, start_run
from trainer.snapshot import SUPERSEDED, is_pinned, pin, retire, snapshot_names, supersede_after, unpin, verify
from trainer.state import checkpoint
from trainer.state.durable import make_folder, remove_folder, replace_text

TENSORS = {"weights": torch.ones(3)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run directory that is on disk."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def power(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Disk]:
    """power(act, judge, published_folder): calls `act`, then `judge` for every state that a power cut may leave.

    `published_folder` is where files appear. Returns the disk, whose operations can be looked at.
    """

    def run(act: Callable[[], object], judge: Callable[[Path], object], published_folder: str = "") -> Disk:
        judged: list[Tree] = []

        def judge_outcomes() -> None:
            for tree in map(disk.after_power_cut, OUTCOMES):
                if tree not in judged:
                    judge(write(tree, tmp_path / "left"))
                    judged.append(tree)

        with record_changes(root, root / published_folder, monkeypatch) as disk:
            disk.after_each_change = judge_outcomes
            act()
            write(disk.after_power_cut("only what was flushed"), tmp_path / "after")
        return disk

    return run


@pytest.fixture
def after(tmp_path: Path) -> Path:
    """What is surely left of the run directory when all is done."""
    return tmp_path / "after"


def test_a_checkpoint_is_the_old_or_the_new_one(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """The first is there for good when `save` returns, its folder too; the second never takes the first with it."""

    def save() -> None:
        for number in (1, 2):
            checkpoint.save(root, small_checkpoint(1000 * number, number, TENSORS), keep=1)
            saved.append(number)

    def judge(folder: Path) -> None:
        loaded = checkpoint.load_newest(folder)  # raises for a damaged one
        number = loaded.document.run.step if loaded is not None else 0
        assert number >= (saved[-1] if saved else 0)

    saved: list[int] = []
    disk = power(save, judge, "checkpoint")
    assert checkpoint.load_newest(after).document.run.step == 2  # type: ignore[union-attr]
    first = disk.operations.index(("fsync", "checkpoint"))
    assert {Path(path).name for operation, path in disk.operations[:first] if operation == "fsync"} >= {
        "complete.json", "state.json", "state.safetensors",
    }  # fmt: skip


def test_a_snapshot_is_whole_or_absent(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """Each that has a name and a manifest has all its files; LATEST names one of them."""

    def judge(folder: Path) -> None:
        names = snapshot_names(folder)
        for name in names:
            verify(folder / "snapshots" / name)
        if (folder / "snapshots" / "LATEST").exists():
            assert (folder / "snapshots" / "LATEST").read_text().strip() in names

    def publish() -> None:
        publish_snapshot(root, 1000)
        publish_snapshot(root, 2000)

    power(publish, judge, "snapshots")
    assert snapshot_names(after) == ["000000001000", "000000002000"]
    assert (after / "snapshots" / "LATEST").read_text() == "000000002000\n"


def test_a_snapshot_that_is_retired_leaves_at_one_stroke(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """No power cut brings back a name whose files are gone."""
    for tokens in (1000, 2000):
        publish_snapshot(root, tokens)

    def judge(folder: Path) -> None:
        for name in snapshot_names(folder):
            verify(folder / "snapshots" / name)

    power(lambda: retire(root, keep=1), judge, "snapshots")
    assert snapshot_names(after) == ["000000002000"]


def test_what_is_superseded_is_whole_wherever_it_is(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """A trainer that resumes moves later snapshots aside: whole, at any moment, and LATEST names one that is there."""
    for tokens in (1000, 2000):
        publish_snapshot(root, tokens)

    def judge(root: Path) -> None:
        names = snapshot_names(root)
        for folder in (*(root / "snapshots" / name for name in names), *(root / "snapshots" / SUPERSEDED).glob("*")):
            verify(folder)
        assert (root / "snapshots" / "LATEST").read_text().strip() in names

    power(lambda: supersede_after(root, 1000), judge, "snapshots")
    assert snapshot_names(after) == ["000000001000"]
    assert [path.name for path in (after / "snapshots" / SUPERSEDED).glob("*")] == ["000000002000"]


@pytest.mark.parametrize("name", ["settings.toml", "summary.json"])
def test_a_text_is_the_old_or_the_new_one(root: Path, after: Path, power: Callable[..., Disk], name: str) -> None:
    """And the new one when the call has returned."""
    (root / name).write_text("old")

    def judge(folder: Path) -> None:
        assert (folder / name).read_text() in ("old", "new")

    power(lambda: replace_text(root / name, "new"), judge)
    assert (after / name).read_text() == "new"


def test_a_text_that_cannot_be_written_leaves_nothing_behind(root: Path) -> None:
    """The old one stays; a surrogate half cannot be encoded."""
    replace_text(root / "settings.toml", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(root / "settings.toml", "new \ud800")
    assert [path.name for path in root.iterdir()] == ["settings.toml"]
    assert (root / "settings.toml").read_text() == "old"


def test_a_folder_and_those_above_it_stay(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    power(lambda: make_folder(root / "a" / "b"), lambda left: None)
    assert (after / "a" / "b").is_dir()


def test_a_removed_folder_stays_away(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """Its name is gone from disk before the first of its files is."""
    make_folder(root / "a")
    (root / "a" / "file").write_text("whole")

    def judge(folder: Path) -> None:
        assert not (folder / "a").exists() or (folder / "a" / "file").read_text() == "whole"

    power(lambda: remove_folder(root / "a"), judge)
    assert not (after / "a").exists()


def test_a_pin_holds(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """What `ctl` has answered is on disk: pinned, and then no more."""
    folder = publish_snapshot(root, 1000)
    power(lambda: pin(root, folder.name), lambda left: None)
    assert is_pinned(after / "snapshots" / folder.name)
    power(lambda: unpin(root, folder.name), lambda left: None)
    assert not is_pinned(after / "snapshots" / folder.name)


def test_keys_that_were_written_are_there(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """They are never overwritten, so that an empty one would be in the way."""
    write_keys(root / "keys")  # the folder is the operator's
    for path in list((root / "keys").rglob("*.key*")):
        path.unlink()
    power(lambda: write_keys(root / "keys"), lambda left: None)
    assert "secret-key" in (after / "keys" / "client.key_secret").read_text()
    assert "public-key" in (after / "keys" / "clients" / "client.key").read_text()


def test_what_latents_do_is_whole_or_absent(root: Path, after: Path, power: Callable[..., Disk]) -> None:
    """The monitor takes its absence for work to be done, and half of it for the truth."""
    one = LatentActivations(
        ids=np.zeros((1, 2), np.uint32), shown=np.ones((1, 2), bool), streamed=np.ones((1, 2), bool),
        starts=np.array([0, 1]), positions=np.array([1], np.uint32), values=np.array([2.0], np.float32),
        born=np.zeros(1, np.int64), outliers=np.zeros((1, 2), bool),
    )  # fmt: skip
    path = root / "latents.safetensors"

    def judge(folder: Path) -> None:
        if (folder / path.name).exists():
            assert load_latents(folder / path.name).values.tolist() == [2.0]

    power(lambda: one.save(path), judge)
    assert (after / path.name).exists()


def test_a_snapshot_that_was_pulled_is_whole_or_absent(
    root: Path, after: Path, tmp_path: Path, power: Callable[..., Disk]
) -> None:
    """Pulled again after a power cut, it would be taken for fetched; its evaluation comes later, whole as well."""
    source = start_run(tmp_path / "elsewhere")
    folder = publish_snapshot(source, 1000)
    replace_text(folder / "small" / "evaluation.json", json.dumps({"kl": 0.5}))

    def judge(folder: Path) -> None:
        for path in folder.glob("0*"):
            verify(path)

    port, close = start_service(make_app(source, new_registry()), "127.0.0.1", 0)
    power(lambda: pull(Monitor(f"http://127.0.0.1:{port}"), root), judge)
    close()
    assert json.loads((after / "000000001000" / "small" / "evaluation.json").read_text()) == {"kl": 0.5}
