"""The numbers of a run for other programs, opened by those programs' own libraries."""

from __future__ import annotations

import csv
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import monitor.app
from monitor.cli.export import main
from monitor.evaluation.results import Evaluation
from monitor.export.records import ColumnType, Record, RunTable, scan
from monitor.export.wandb_live import live_runs, require_login
from monitor.history import append_evaluation
from monitor.settings import MonitorSettings, MonitorTable
from producer.settings import RunSettings
from tests.small_run import start_run


def add_report(run: Path, tokens: int, time: float, **fvus: float | None) -> None:
    """Appends a report; `fvus` are by SAE."""
    saes = [{"name": name, "fvu": fvu, "l0": 32, "loss": {"auxiliary": 0.5}} for name, fvu in fvus.items()]
    report = {"time": time, "tokens": tokens, "state": "training", "stream": {"epoch": 0}, "saes": saes}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(report) + "\n")


def add_evaluation(run: Path, tokens: int, time: float, ce_delta: float) -> None:
    values = {"ce_delta": ce_delta, "probe_accuracy": {"k1": 0.75}}
    append_evaluation(run, "topk", Evaluation(values=values, snapshot_tokens=tokens, rows=100), time)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two SAEs, killed after 300 tokens and resumed at 100: what followed the first time does not count."""
    run = start_run(tmp_path / "run")
    add_report(run, 100, 1.0, topk=0.5)
    add_report(run, 200, 2.0, topk=0.9)
    add_report(run, 300, 3.0, topk=0.9)
    add_evaluation(run, 300, 4.0, ce_delta=9.0)
    add_report(run, 150, 5.0, topk=0.4, jump=0.6)
    add_report(run, 250, 6.0, topk=None, jump=0.3)
    add_evaluation(run, 150, 7.0, ce_delta=0.2)
    return run


def export(run: Path, to: Path, format_name: str) -> None:
    assert main([str(run), "--to", str(to), "--format", format_name]) == 0


def test_a_run_is_rows_of_three_tables(run: Path) -> None:
    """Keys of nested objects are joined by dots; what a resumed run gave up is left out."""
    records = scan(run)
    rows = list(records.rows())

    assert [(row.tokens, row.sae) for row in rows if row.table is RunTable.RUN] == [
        (100, None),
        (150, None),
        (250, None),
    ]
    assert rows[1] == Record(RunTable.TRAINING, 1.0, 100, "topk", {"fvu": 0.5, "l0": 32, "loss.auxiliary": 0.5})
    assert rows[-1] == Record(
        RunTable.EVALUATION, 7.0, 150, "topk", {"ce_delta": 0.2, "probe_accuracy.k1": 0.75, "rows": 100}
    )
    assert "fvu" not in rows[-3].values  # unknown
    assert (records.reports, records.evaluations, records.saes) == (3, 1, ("topk", "jump"))
    assert records.columns[RunTable.RUN] == {"state": ColumnType.TEXT, "stream.epoch": ColumnType.INTEGER}


def test_a_run_that_goes_back_twice(tmp_path: Path) -> None:
    """The second time further than the first: what lay between goes too."""
    for tokens in (10, 20, 30, 20, 25, 10, 12):
        add_report(tmp_path, tokens, float(tokens))

    assert [row.tokens for row in scan(tmp_path).rows()] == [10, 12]
    assert [row.tokens for row in scan(tmp_path / "nowhere").rows()] == []


def test_csv(run: Path, tmp_path: Path) -> None:
    """Python's own reader; a value that is not known is empty."""
    export(run, tmp_path / "out", "csv")

    with open(tmp_path / "out/training.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sae"], row["tokens"], row["fvu"]) for row in rows] == [
        ("topk", "100", "0.5"), ("topk", "150", "0.4"), ("jump", "150", "0.6"), ("topk", "250", ""),
        ("jump", "250", "0.3"),
    ]  # fmt: skip
    assert (tmp_path / "out/evaluation.csv").read_text().splitlines() == [
        "time,tokens,sae,ce_delta,probe_accuracy.k1,rows", "7.0,150,topk,0.2,0.75,100"
    ]  # fmt: skip


def test_parquet(run: Path, tmp_path: Path) -> None:
    """By pyarrow, with types."""
    from pyarrow import parquet

    export(run, tmp_path / "out", "parquet")

    table = parquet.read_table(tmp_path / "out/training.parquet")
    assert table["fvu"].to_pylist() == [0.5, 0.4, 0.6, None, 0.3]
    assert {name: str(table.schema.field(name).type) for name in ("time", "tokens", "sae", "l0")} == {
        "time": "double", "tokens": "int64", "sae": "string", "l0": "int64"
    }  # fmt: skip
    assert parquet.read_table(tmp_path / "out/run.parquet")["state"].to_pylist() == ["training"] * 3


def test_tensorboard(run: Path, tmp_path: Path) -> None:
    """By TensorBoard's reader: SAEs are its runs, so that their curves lie over each other; steps are tokens."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    export(run, tmp_path / "out", "tensorboard")

    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "out")).Reload()
    assert set(events.Runs()) == {"run", "topk", "jump"}
    jump = events.Scalars("jump", "training/fvu")
    assert [(event.step, event.wall_time, round(event.value, 6)) for event in jump] == [
        (150, 5.0, 0.6),
        (250, 6.0, 0.3),
    ]
    assert [event.step for event in events.Scalars("topk", "training/loss/auxiliary")] == [100, 150, 250]
    assert [event.step for event in events.Scalars("topk", "evaluation/ce_delta")] == [150]
    assert events.Runs()["run"]["scalars"] == ["run/stream/epoch"]


def test_wandb(run: Path, tmp_path: Path) -> None:
    """By W&B's own messages, read from the files that `wandb sync` uploads: a run for each SAE, in one group."""
    export(run, tmp_path / "out", "wandb")

    runs = {name: rows for name, rows in map(read_wandb, (tmp_path / "out/wandb").glob("offline-run-*/run-*.wandb"))}
    assert set(runs) == {("run", "run/stream"), ("run", "run/topk"), ("run", "run/jump")}
    assert [(row["tokens"], row["_timestamp"], row["training/fvu"]) for row in runs["run", "run/jump"]] == [
        (150, 5.0, 0.6), (250, 6.0, 0.3)
    ]  # fmt: skip
    assert [row["evaluation/ce_delta"] for row in runs["run", "run/topk"] if "evaluation/ce_delta" in row] == [0.2]
    assert [row["run/state"] for row in runs["run", "run/stream"]] == ["training"] * 3


def test_wandb_live(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was appended is sent until the monitor ends; the next one goes on there, in runs of the same ids."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_login()
    with live_runs(run, poll_seconds=0.01):
        pass
    add_report(run, 350, 8.0, topk=0.2)
    add_evaluation(run, 350, 9.0, ce_delta=0.1)
    with live_runs(run, poll_seconds=0.01):
        pass

    topk = [path for path in run.glob("wandb/offline-run-*/run-*.wandb") if path.stem.endswith("topk")]
    assert len(topk) == 2 and topk[0].stem == topk[1].stem
    tokens = [[row["tokens"] for row in read_wandb(path)[1]] for path in topk]
    assert sorted(tokens) == [[100, 200, 300, 150, 250, 300, 150], [350, 350]]


def test_wandb_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, with exit code 2, and not by a question in the terminal."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = RunSettings(directory=str(tmp_path / "run"))
    settings = MonitorSettings(run=run, monitor=MonitorTable(wandb=True, port=0, service_port=0))

    assert monitor.app.run(settings, until_evaluated=False, stop=threading.Event()) == 2
    assert "monitor.wandb = true needs a key: run `wandb login` or set WANDB_API_KEY" in caplog.text


def read_wandb(path: Path) -> tuple[tuple[str, str], list[dict[str, Any]]]:
    """((group, name), rows of the history) of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    name, rows = ("", ""), []
    for data in leveldb_records(path.read_bytes()[7:]):
        message = Message.FromString(data)
        if message.HasField("run"):
            name = (message.run.run_group, message.run.display_name)
        if message.HasField("history"):
            items = message.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return name, rows


def leveldb_records(data: bytes, block: int = 32_768, header: int = 7) -> Iterator[bytes]:
    """Records of a log of LevelDB: in blocks, the first of them shorter by the file's own header."""
    position, record = header, b""
    data = bytes(header) + data
    while position + header <= len(data):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a sentence, and nothing is written."""
    assert main([str(tmp_path), "--to", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} holds no metrics.jsonl: name a run directory" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    assert main([str(tmp_path), "--to", str(tmp_path / "out")]) == 2
    assert "holds no report yet" in capsys.readouterr().err
    assert main([str(run), "--to", str(run)]) == 2
    assert f"{run} exists and is not an empty folder: choose another --to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--to", str(tmp_path / "out"), "--format", "xlsx"])
