"""JSON and TOML from outside: whatever is wrong with them ends in one kind of error, wherever they are read."""

from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from monitor.cli.client import Monitor
from monitor.cli.errors import MonitorError
from monitor.cli.pull import main as pull
from monitor.cli.top import main as top
from monitor.files import read_json
from monitor.history import History
from monitor.http.service import make_app
from monitor.run_directory import last_report, read_run
from producer.common.metrics import new_registry
from producer.common.parsing import MAX_DEPTH, ParseError, parse_json, parse_object, parse_toml
from producer.common.run_file import read_run_file
from producer.common.toml import SettingsError
from producer.settings import ProducerSettings
from tests.small_run import publish_snapshot, small_checkpoint, start_run
from trainer.control.ctl import CtlError, read_sae_table
from trainer.saes.formats import read_published
from trainer.saes.inference import load_sae
from trainer.snapshot import SnapshotError, file_sha256, read_manifest
from trainer.state.check import main as check
from trainer.state.checkpoint import CheckpointError, load_newest, save

DIGITS = b"3" * 5000
BAD = {
    "cut short": (b'{"a": ', "not JSON: Expecting value: line 1 column 7"),
    "5,000 digits": (b'{"a": 1,\n"b": ' + DIGITS + b"}", "an integer of 5,000 digits at line 2 column 6 (char 14)"),
    "nested": (b'{"a": ' + b"[" * 100_000, f"nested more than {MAX_DEPTH} deep at line 1 column 506 (char 505)"),
    "nested and closed": (b'{"a":' * 600 + b"1" + b"}" * 600, f"nested more than {MAX_DEPTH} deep at line 1 column"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 7 (0xff: invalid start byte)"),
    "a list": (b"[1]", "a JSON list, expected an object"),
    "nothing": (b"", "not JSON: Expecting value"),
}


@pytest.fixture(params=BAD, ids=list(BAD))
def bad(request: pytest.FixtureRequest) -> bytes:
    return BAD[request.param][0]


# The parser


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=list(BAD))
def test_each_fault_is_one_error_that_says_where(data: bytes, message: str) -> None:
    """ValueError of an integer, RecursionError and UnicodeDecodeError are faults of the document like any other."""
    with pytest.raises(ParseError) as error:
        parse_object(data)
    assert str(error.value).startswith(message)


def test_digits_and_brackets_in_a_string_are_no_fault() -> None:
    """Text may hold what a document may not."""
    text = "3" * 5000 + "[{" * 1000 + '"\\'
    assert parse_object(json.dumps({"text": text, "n": 7})) == {"text": text, "n": 7}


def test_the_deepest_document() -> None:
    """As deep as is allowed, wherever the caller stands on the stack."""

    def below(calls: int) -> Any:
        return below(calls - 1) if calls else parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)

    for calls in (0, 200):
        value, depth = below(calls), 0
        while value != []:
            value, depth = value[0], depth + 1
        assert depth == MAX_DEPTH - 1


def test_what_cannot_be_written_again() -> None:
    """Half a character fails in every encoder; NaN and infinities are no JSON, and 1e999 is one of them."""
    text = r'{"\udc00": ["\ud83d", "\ud83d\ude00", "\\ud83d"], "a": [NaN, -Infinity, 1e999, 1.5]}'
    value = parse_object(text, finite=True)
    assert value == {"\ufffd": ["\ufffd", "😀", r"\ud83d"], "a": [None, None, None, 1.5]}
    nan, minus, plus, number = parse_object(text)["a"]
    assert math.isnan(nan) and (minus, plus, number) == (-math.inf, math.inf, 1.5)


def test_a_byte_order_mark_is_no_part_of_a_document() -> None:
    """Editors write one."""
    assert parse_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse_toml(b"\xef\xbb\xbfa = 1") == {"a": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a =", "Invalid value"),
        (b"a = 1\nb = " + DIGITS, "an integer of 5,000 digits at line 2 column 5"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b"a = '\xff'", "not UTF-8 at byte 5"),
    ],
)
def test_toml_has_the_same_faults(data: bytes, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_toml(data)


# Who reads


@pytest.mark.parametrize("data", [b"a =", b"[run]\nseed = " + DIGITS, b"[run]\nseed = " + b"[" * 5000, b"\xff"])
def test_a_wrong_run_file_or_sae_table_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    with pytest.raises(SettingsError, match=r"run\.toml"):
        read_run_file(ProducerSettings, path, [])
    with pytest.raises(CtlError, match=r"run\.toml is not (valid TOML|UTF-8)"):
        read_sae_table(path)


@pytest.mark.parametrize("value", ["3" * 5000, "[" * 5000])
def test_a_wrong_override_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nname = 'm'\nhooks = ['h']\n")
    with pytest.raises(SettingsError, match=r"run\.seed"):
        read_run_file(ProducerSettings, path, [f"run.seed={value}"])


def test_a_wrong_checkpoint_is_refused(tmp_path: Path, bad: bytes) -> None:
    """Whoever can write there can write the hashes too; and the file of the hashes may be as wrong."""
    folder = save(tmp_path, small_checkpoint(), keep=1)
    (folder / "state.json").write_bytes(bad)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in folder.glob("state.*")}
    (folder / "complete.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_newest(tmp_path)
    (folder / "complete.json").write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"complete\.json is damaged"):
        load_newest(tmp_path)


@pytest.mark.parametrize("read", [load_sae, read_published])
def test_a_wrong_cfg_is_refused(tmp_path: Path, bad: bytes, read: Callable[[Path], Any]) -> None:
    folder = publish_snapshot(tmp_path, 1000) / "small"
    (folder / "cfg.json").write_bytes(bad)
    with pytest.raises(SnapshotError):
        read(folder)


def test_a_wrong_manifest_is_refused_and_the_service_answers_without_it(tmp_path: Path, bad: bytes) -> None:
    """The other snapshots are listed and served."""
    directory = start_run(tmp_path / "run")
    publish_snapshot(directory, 1000)
    (publish_snapshot(directory, 2000) / "manifest.json").write_bytes(bad)
    with pytest.raises(SnapshotError, match=r"manifest\.json cannot be read"):
        read_manifest(directory / "snapshots" / "000000002000")
    client = TestClient(make_app(directory, new_registry()))
    assert [entry["name"] for entry in client.get("/v1/snapshots").json()["snapshots"]] == ["000000001000"]
    assert client.get("/").status_code == 200
    assert client.get("/v1/run").status_code == 200


@pytest.mark.parametrize("change", [{"saes": 3}, {"saes": {"a": 1}}, {"files": [3]}, {"name": None}, {"run": []}])
def test_a_manifest_without_its_parts_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """JSON, and yet no manifest: a KeyError later would be a traceback in whoever reads it."""
    folder = publish_snapshot(tmp_path, 1000)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(SnapshotError, match=rf"manifest\.json lacks .*{next(iter(change))}"):
        read_manifest(folder)


def test_a_run_directory_of_wrong_files_is_shown(tmp_path: Path, bad: bytes) -> None:
    """What cannot be read is absent: no page and no list ends in a traceback."""
    directory = start_run(tmp_path / "run")
    folder = publish_snapshot(directory, 1000)
    for path in ("settings.toml", "summary.json", "snapshots/000000001000/small/evaluation.json"):
        (directory / path).write_bytes(bad)
    (directory / "metrics.jsonl").write_bytes(bad.replace(b"\n", b" ") + b"\n")
    (directory / "evaluations.jsonl").write_bytes(bad.replace(b"\n", b" ") + b"\n")
    assert last_report(directory) is None and read_json(folder / "small" / "evaluation.json", folder) is None
    assert read_run(directory)["summary"] is None
    History(directory).columns(-1, 0)
    client = TestClient(make_app(directory, new_registry()))
    for path in ("/", "/v1/run", "/v1/snapshots", "/v1/history"):
        assert client.get(path).status_code == 200, path


def test_what_the_service_passes_on_is_json(tmp_path: Path) -> None:
    """Half a character, an infinity or a date in a file of the run makes no answer fail."""
    directory = start_run(tmp_path / "run")
    folder = publish_snapshot(directory, 1000)
    (directory / "settings.toml").write_text("[run]\ndirectory = 'r'\nwhen = 2026-01-01\nlimit = inf\n")
    (folder / "small" / "evaluation.json").write_text(r'{"ce_delta": 1e999, "note": "\ud83d"}')
    client = TestClient(make_app(directory, new_registry()))
    assert client.get("/v1/run").json()["settings"]["run"] == {"directory": "r", "when": "2026-01-01", "limit": None}
    entry = client.get("/v1/snapshots").json()["snapshots"][0]
    assert entry["saes"]["small"]["evaluation"] == {"ce_delta": None, "note": "\ufffd"}


def test_check_names_wrong_lines_of_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = start_run(tmp_path / "run")
    (directory / "metrics.jsonl").write_bytes(b'{"tokens": 1}\n' + b"[" * 100_000 + b"\n" + DIGITS + b"\n")
    assert check([str(directory)]) == 1
    assert "metrics.jsonl: 2 lines are no JSON, the first is line 2" in capsys.readouterr().err


@pytest.fixture
def stranger(bad: bytes) -> Iterator[str]:
    """The address of a server that answers everything with one wrong document."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(bad)))
            self.end_headers()
            self.wfile.write(bad)

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_commands_refuse_what_a_stranger_answers(
    stranger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and a sentence, whatever the answer is."""
    with pytest.raises(MonitorError, match="is no JSON object"):
        Monitor(stranger, None).read("/v1/run")
    assert pull([stranger, "--to", str(tmp_path)]) == 1
    assert top([stranger]) == 1
    output = capsys.readouterr().err
    assert output.count("is this the address of a Sluice monitor?") == 2 and "Traceback" not in output
