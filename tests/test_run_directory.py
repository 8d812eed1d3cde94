"""A trainer's start and its run directory: what was published is never deleted, and one folder is one truth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drills.scene import Scene
from tests.small_run import finish_run, publish_snapshot
from trainer.__main__ import main
from trainer.snapshot import snapshot_names, verify
from trainer.state.checkpoint import complete_folders, load_newest
from trainer.state.durable import replace_text, sweep
from trainer.state.run_directory import RunDirectory, RunDirectoryError

RUN = """
[run]
directory = "DIR/run"
[corpus]
kind = "synthetic"
[corpus.synthetic]
d_in = 8
features = 16
shards = 4
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 32
k = 4
"""


@pytest.fixture
def start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[int, str]]:
    """Starts a trainer that will refuse, in this process: (exit code, log)."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    file = tmp_path / "run.toml"
    file.write_text(RUN.replace("DIR", str(tmp_path)))

    def begin() -> tuple[int, str]:
        caplog.clear()
        return main([str(file)]), caplog.text

    return begin


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the lock, which a start makes."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "lock"}


def publish_two(directory: Path) -> None:
    directory.mkdir()
    publish_snapshot(directory, 1000, id="first")
    publish_snapshot(directory, 2000, id="first")


@pytest.mark.parametrize("finished", [True, False])
def test_a_start_without_a_checkpoint_touches_nothing_that_is_published(
    start: Callable[[], tuple[int, str]], tmp_path: Path, finished: bool
) -> None:
    """The checkpoint of a run was removed: the same command refuses, says what to do, and every file stays."""
    publish_two(tmp_path / "run")
    if finished:
        finish_run(tmp_path / "run", 2000)
    before = contents(tmp_path / "run")
    code, error_text = start()

    assert code == 1
    assert "2 snapshots, 000000001000 to 000000002000" in error_text and ("summary.json" in error_text) == finished
    assert "from a backup, choose another run.directory, or move what is there away: mv " in error_text
    assert contents(tmp_path / "run") == before


def lose_complete_json(run: Path) -> None:
    (run / "checkpoint" / "000000002000-000003").mkdir(parents=True)


def make_checkpoint_a_file(run: Path) -> None:
    run.mkdir()
    (run / "checkpoint").write_text("")


def make_lock_a_folder(run: Path) -> None:
    (run / "lock").mkdir(parents=True)


def leave_summary(run: Path) -> None:
    run.mkdir()
    finish_run(run, 2000)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose_complete_json, "checkpoint 000000002000-000003 without its complete.json, and no checkpoint"),
        (make_checkpoint_a_file, "a file where the folder checkpoint should be"),
        (make_lock_a_folder, "lock, the run's lock, cannot be opened: Is a directory; mend or remove it"),
        (leave_summary, "holds summary.json, and no checkpoint to go on from"),
    ],
)
def test_a_directory_in_which_something_is_wrong_is_refused(
    start: Callable[[], tuple[int, str]], tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    """1, and a sentence that names the fault; nothing is written."""
    damage(tmp_path / "run")
    before = contents(tmp_path / "run")
    code, error_text = start()

    assert code == 1 and sentence in error_text
    assert contents(tmp_path / "run") == before


def test_what_killed_writers_left_is_swept_wherever_it_is(tmp_path: Path) -> None:
    """Beside settings.toml, and inside a snapshot, where a monitor writes."""
    folder = publish_snapshot(tmp_path, 1000)
    (tmp_path / ".tmp-99-settings.toml").write_text("half")
    (folder / "small" / ".tmp-99-evaluation.json").write_text("half")
    (tmp_path / "snapshots" / ".tmp-99-000000002000").mkdir()
    before = len(list(tmp_path.rglob("*")))
    sweep(tmp_path)

    assert len(list(tmp_path.rglob("*"))) == before - 3
    verify(folder)


def test_a_writer_survives_the_sweep_of_its_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor writes summary.json at the moment at which a trainer starts: it writes again."""
    monkeypatch.setattr("trainer.state.durable.flush", lambda _: (monkeypatch.undo(), sweep(tmp_path)))
    replace_text(tmp_path / "summary.json", "whole")

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("summary.json", "whole")]


def test_a_folder_is_known_by_more_than_its_path(tmp_path: Path) -> None:
    """Moved, removed, or replaced by another of the same name."""
    path = tmp_path / "run"
    with RunDirectory(path) as directory:
        assert directory.is_in_place and directory.current_path == path
        with pytest.raises(RunDirectoryError, match="belongs to a trainer that is running"):
            RunDirectory(path)
        path.rename(tmp_path / "elsewhere")
        path.mkdir()
        assert not directory.is_in_place and directory.current_path == tmp_path / "elsewhere"
        assert f"was moved to {tmp_path / 'elsewhere'}" in directory.fault()
        shutil.rmtree(tmp_path / "elsewhere")
        assert directory.current_path is None and "was removed" in directory.fault()


@pytest.mark.long
def test_a_run_directory_that_moves_ends_its_trainer_with_a_checkpoint_in_it(tmp_path: Path) -> None:
    """`mv` of a live run: nothing is made anew under the old path, and the run goes on from where it is now.

    Before it began, a trainer had left reports and no checkpoint there: those are not continued.
    """
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"tokens": 512}\n')
    with Scene(tmp_path, "snapshots.every_tokens=4000", "checkpoint.every_seconds=1000.0") as scene:
        trainer, _ = scene.trainer(SECONDS_PER_STEP=0.01), scene.producer()
        scene.wait_for_rows(6000)
        scene.run.rename(elsewhere)
        assert trainer.wait(120) == 1
        assert not scene.run.exists(), "a second truth"
        assert (elsewhere / "metrics-1.jsonl").read_text() == '{"tokens": 512}\n'
        assert (elsewhere / "metrics.jsonl").read_text().count('"tokens": 512,') == 0
        assert f"was moved to {elsewhere}" in scene.log() and "Traceback" not in scene.log()
        trained_rows = scene.trained_rows
        newest = complete_folders(elsewhere / "checkpoint")[-1]
        assert int(newest.name.split("-")[0]) == trained_rows > 6000
        assert all(int(name) <= trained_rows for name in snapshot_names(elsewhere))

        assert scene.trainer(f"run.directory={elsewhere}").wait(60) == 0
        scene.run = elsewhere
        scene.outcome(1, 1)
        saved = load_newest(elsewhere)
        assert saved is not None and f"resuming run {saved.document.ledger.run}" in scene.log()
