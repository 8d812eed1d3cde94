"""Several runs side by side: which runs there are, how they compare, and what is served."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from monitor.cli.serve import main
from monitor.runs.directories import NoRunsError, check_paths, find_runs
from monitor.runs.frontier import frontier
from monitor.runs.records import SettingRow, frontiers, read_record, setting_rows
from monitor.runs.service import make_runs_app
from tests.small_run import identity_sae, publish_snapshot, start_run
from trainer.state.durable import replace_text

TOKEN = "a-token-of-sixteen-letters"


def add_run(directory: Path, k: int = 32, l0: float = 4.0, fvu: float = 0.25, ce_delta: float | None = None) -> Path:
    """A run with one report and a snapshot of the SAE `small`, which is evaluated where there is a ΔCE."""
    start_run(directory)
    with open(directory / "settings.toml", "a") as file:
        file.write(f'[[sae]]\nname = "small"\nk = {k}\n')
    sae = {"name": "small", "l0": l0, "fvu": fvu, "density": [8]}
    line = {"time": time.time(), "tokens": 1000, "target_tokens": 4000, "tokens_per_second": 50.0, "state": "training"}
    (directory / "metrics.jsonl").write_text(json.dumps({**line, "saes": [sae]}) + "\n")
    folder = publish_snapshot(directory, 1000, [identity_sae("small")])
    if ce_delta is not None:
        replace_text(folder / "small" / "evaluation.json", json.dumps({"l0": l0, "fvu": fvu, "ce_delta": ce_delta}))
    return directory


def test_runs_are_named_or_lie_in_a_folder(tmp_path: Path):
    """Folders of other things are passed over; runs of one name are told apart; a run named twice is there once."""
    for name in ("one/a", "one/b", "two/a"):
        start_run(tmp_path / name)
    (tmp_path / "one" / "notes").mkdir()
    assert list(find_runs([tmp_path / "one"])) == ["a", "b"]
    assert list(find_runs([tmp_path / "one", tmp_path / "two" / "a", tmp_path / "one" / "b"])) == [
        "one/a",
        "b",
        "two/a",
    ]


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path):
    """A folder without runs is not: they may come."""
    check_paths([tmp_path])
    with pytest.raises(NoRunsError, match="does not exist; name run directories"):
        check_paths([tmp_path / "nowhere"])
    assert main([str(tmp_path / "nowhere")]) == 2


def test_the_frontier_has_what_nothing_beats():
    """(L0, loss) by hand: the third is denser and worse than the second; equal points are both on it."""
    points = [(10.0, 0.5), (20.0, 0.3), (25.0, 0.4), (40.0, 0.1), (40.0, 0.1), (40.0, 0.2)]
    assert frontier(points) == [0, 1, 3, 4]
    assert frontier([]) == []


def test_numbers_of_one_kind_of_text_make_a_frontier(tmp_path: Path):
    """Where some SAEs are evaluated, those of training alone are left out of the line."""
    runs = [add_run(tmp_path / "a", ce_delta=0.5), add_run(tmp_path / "b", l0=1.0, fvu=0.01)]
    records = [read_record(run.name, run) for run in runs]
    assert [(sae.title, sae.measured) for record in records for sae in record.saes] == [
        ("a/small", "held-out"),
        ("b/small", "training"),
    ]
    assert frontiers(records) == {"fvu": ["a/small"], "ce_delta": ["a/small"]}
    assert frontiers(records[1:]) == {"fvu": ["b/small"], "ce_delta": []}


def test_settings_stand_side_by_side(tmp_path: Path):
    """SAEs by their names, whatever their order; the value that differs from the others is marked."""
    runs = [add_run(tmp_path / name, k) for name, k in (("a", 32), ("b", 64), ("c", 32))]
    rows = {row.key: row for row in setting_rows([read_record(run.name, run) for run in runs])}
    assert rows["sae.small.k"] == SettingRow("sae.small.k", ["32", "64", "32"])
    assert rows["sae.small.k"].differs and rows["sae.small.k"].marks == [False, True, False]
    assert not rows["model.name"].differs


def test_the_page_shows_all_runs(tmp_path: Path):
    """As it is sent: each run, its SAEs, and the settings that differ, marked."""
    add_run(tmp_path / "a", 32, ce_delta=0.5)
    add_run(tmp_path / "b", 64)
    client = TestClient(make_runs_app([tmp_path]))
    page = client.get("/").text
    assert page.count('<span class="state training">') == 2 and "<mark>64</mark>" in page
    assert "0.5000" in page and "1,000" in page and 'data-frontier="ce_delta"' in page
    parts = client.get("/parts")
    assert parts.json()["runs"] == ["a", "b"] and set(parts.json()["colours"]) == {"a/small", "b/small"}
    assert client.get("/parts", headers={"If-None-Match": parts.headers["etag"]}).status_code == 304


def test_programs_get_runs_and_curves(tmp_path: Path):
    """Those of each run as its own monitor has them; a name that is a path of another folder is unknown."""
    add_run(tmp_path / "one" / "a")
    add_run(tmp_path / "two" / "a")
    client = TestClient(make_runs_app([tmp_path / "one", tmp_path / "two"]))
    assert [run["name"] for run in client.get("/v1/runs").json()["runs"]] == ["one/a", "two/a"]
    assert client.get("/v1/runs/one/a").json()["report"]["tokens"] == 1000
    assert client.get("/v1/runs/two/a/history").json()["saes"]["small"]["fvu"] == [0.25]
    answer = client.get("/v1/runs/../../etc")
    assert answer.status_code == 404
    assert client.get("/v1/runs/c").json()["error"] == "no run 'c' here; there are one/a, two/a"
    assert client.post("/v1/runs").json()["error"] == "POST is not served: this service only reads"


def test_a_new_run_appears_and_a_removed_one_leaves(tmp_path: Path):
    """The folders are looked at with each request."""
    client = TestClient(make_runs_app([tmp_path]))
    assert "None yet" in client.get("/").text
    add_run(tmp_path / "a")
    assert [run["name"] for run in client.get("/v1/runs").json()["runs"]] == ["a"]
    shutil.rmtree(tmp_path / "a")
    assert client.get("/v1/runs").json()["runs"] == []


def test_a_token_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the service where it has one, and by the command where others reach it."""
    client = TestClient(make_runs_app([tmp_path], TOKEN))
    assert client.get("/v1/runs").status_code == 401
    assert client.get("/v1/runs", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--host", "0.0.0.0"])
    assert "name a token's file as --token-file" in capsys.readouterr().err
