"""Which snapshots there are, asked again and again while they come and go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from monitor.run_directory import LATENTS, snapshots_until, snapshots_with
from monitor.snapshot_index import RECHECKED_SNAPSHOTS, SnapshotIndex, index_of
from tests.small_run import identity_sae, publish_snapshot, start_run
from trainer.snapshot import retire


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return start_run(tmp_path / "demo")


@pytest.fixture
def index(run_directory: Path) -> SnapshotIndex:
    return index_of(run_directory)


def names(*thousands: int) -> list[str]:
    return [f"{1000 * number:012d}" for number in thousands]


def age(run_directory: Path) -> None:
    """As if nothing had changed for long."""
    os.utime(run_directory / "snapshots", (1.0, 1.0))


def test_it_follows_what_comes_and_goes(run_directory: Path, index: SnapshotIndex):
    """Before the run begins, snapshots one by one, some retired, all gone, and new ones under old names."""
    assert index.names() == []
    publish_snapshot(run_directory, 1000)
    publish_snapshot(run_directory, 2000)
    assert index.names() == names(1, 2)
    retire(run_directory, keep=1)
    assert index.names() == names(2)
    shutil.rmtree(run_directory / "snapshots")
    assert index.names() == []
    publish_snapshot(run_directory, 3000)
    publish_snapshot(run_directory, 2000)
    assert index.names() == names(2, 3)


def test_one_in_the_same_tick_of_the_clock_is_seen(run_directory: Path, index: SnapshotIndex):
    """The folder's time has not changed since it was last read, and the new one is there all the same."""
    folder = publish_snapshot(run_directory, 1000).parent
    before = folder.stat()
    assert index.names() == names(1)
    publish_snapshot(run_directory, 2000)
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert index.names() == names(1, 2)


def test_what_has_not_changed_is_not_read_again(
    run_directory: Path, index: SnapshotIndex, monkeypatch: pytest.MonkeyPatch
):
    """Long after the last change; a new one costs a look at that one only."""
    publish_snapshot(run_directory, 1000)
    age(run_directory)
    index.names()
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda path: 1 / 0)
        assert index.names() == names(1)
    publish_snapshot(run_directory, 2000)
    looked_at: list[str] = []
    is_file = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked_at.append(str(path)) or is_file(path))
    assert index.names() == names(1, 2)
    assert [path.split("/")[-2] for path in looked_at] == names(2)


def test_a_manifest_that_comes_later_makes_a_snapshot(run_directory: Path, index: SnapshotIndex):
    """A person copies one: its folder is there first, and the folder above does not change again."""
    folder = publish_snapshot(run_directory, 1000)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    age(run_directory)
    assert index.names() == []
    (folder / "manifest.json").write_text(manifest)
    assert index.names() == names(1)


def test_the_newest_that_has_a_file_is_told(run_directory: Path, index: SnapshotIndex):
    """As it comes to newer ones, and when it is retired; a folder that no manifest names has nothing."""
    for number in (1, 2, 3):
        publish_snapshot(run_directory, 1000 * number)
    folder = run_directory / "snapshots"
    assert index.newest_with("small", LATENTS) is None
    (folder / names(1)[0] / "small" / LATENTS).touch()
    assert index.newest_with("small", LATENTS) == names(1)[0]
    (folder / names(3)[0] / "small" / LATENTS).touch()
    assert index.newest_with("small", LATENTS) == names(3)[0]
    shutil.rmtree(folder / names(3)[0])
    assert index.newest_with("small", LATENTS) == names(1)[0]
    (folder / names(2)[0] / "stranger").mkdir()
    (folder / names(2)[0] / "stranger" / LATENTS).touch()
    assert index.newest_with("stranger", LATENTS) is None
    assert index.newest_with(f"../{names(1)[0]}/small", LATENTS) is None


def test_a_search_in_vain_does_not_go_through_the_history_again(
    run_directory: Path, index: SnapshotIndex, monkeypatch: pytest.MonkeyPatch
):
    """All of it once; then only the newest, where a file may have come."""
    first = publish_snapshot(run_directory, 1000)
    for number in range(2, 3 * RECHECKED_SNAPSHOTS):
        folder = first.parent / names(number)[0]
        folder.mkdir()
        os.link(first / "manifest.json", folder / "manifest.json")
    assert index.newest_with("small", LATENTS) is None
    looked_at: list[str] = []
    is_file = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked_at.append(str(path)) or is_file(path))
    assert index.newest_with("small", LATENTS) is None
    assert sum(path.endswith(LATENTS) for path in looked_at) == RECHECKED_SNAPSHOTS


def test_the_snapshots_of_an_sae_are_those_from_its_first_to_its_last(run_directory: Path):
    """SAEs come and go; a snapshot that another one asks beyond is not read."""
    for number, saes in ((1, "a"), (2, "ab"), (3, "ab"), (4, "b")):
        publish_snapshot(run_directory, 1000 * number, [identity_sae(name) for name in saes])
    assert snapshots_with(run_directory, "a") == names(1, 2, 3)
    assert snapshots_with(run_directory, "b") == names(2, 3, 4)
    assert snapshots_with(run_directory, "b", after=names(2)[0]) == names(3, 4)
    assert snapshots_with(run_directory, "c") == []
    assert snapshots_until(run_directory, "b", names(3)[0]) == names(2, 3)
    assert snapshots_until(run_directory, "a", names(3)[0]) == names(1, 2, 3)
