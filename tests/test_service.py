"""The HTTP service: what is on disk is served exactly, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

import monitor.__main__
from monitor.http.access import TokenError, read_token
from monitor.http.service import PageSizes, make_app, start_service
from monitor.metrics import MonitorMetrics
from monitor.run_directory import last_report
from producer.common.metrics import new_registry
from tests.small_run import finish_run, identity_sae, publish_snapshot, start_run
from trainer.snapshot import pin, retire, snapshot_names
from trainer.state.durable import replace_text

ROOT = Path(__file__).parent.parent
TOKEN = "correct-horse-battery-staple"
WEIGHTS = "/v1/snapshots/000000001000/small/sae_weights.safetensors"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run that has just started."""
    return start_run(tmp_path / "demo")


@pytest.fixture
def client(run_directory: Path) -> TestClient:
    registry = new_registry()
    MonitorMetrics(registry)
    return TestClient(make_app(run_directory, registry), raise_server_exceptions=False)


def test_not_ready_until_the_run_exists(tmp_path: Path):
    """The monitor may start first: it is alive, says what it waits for, and is ready once the trainer has begun."""
    client = TestClient(make_app(tmp_path / "demo", new_registry()))
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "does not exist" in answer.json()["error"]
    assert client.get("/v1/run").json()["state"] == "waiting"
    start_run(tmp_path / "demo")
    assert client.get("/readyz").json() == {"status": "ok"}


def test_run_tells_settings_and_newest_report(run_directory: Path, client: TestClient):
    """A report whose line is still being written does not count, and NaN becomes null."""
    (run_directory / "metrics.jsonl").write_text('{"tokens": 1}\n{"tokens": 2, "saes": [NaN]}\n{"tok')
    run = client.get("/v1/run").json()
    assert run["state"] == "running"
    assert run["settings"]["model"]["name"] == "tiny"
    assert run["report"] == {"tokens": 2, "saes": [None]}


def test_run_is_finished_until_it_goes_on(run_directory: Path, client: TestClient):
    """A summary ends a run; when the run is extended, reports beyond the summary show that it lives again."""
    finish_run(run_directory, 1000)
    assert client.get("/v1/run").json()["state"] == "finished"
    (run_directory / "metrics.jsonl").write_text('{"tokens": 1500}\n')
    assert client.get("/v1/run").json()["state"] == "running"


def test_a_silent_run_is_not_shown_as_training(run_directory: Path, client: TestClient):
    """A killed trainer leaves its last report behind, which soon says nothing about now."""
    for age, expected, hidden in (
        (1, ">training<", "no report for"),
        (600, "no report for 10 min", "<b>9</b> tokens/s"),
    ):
        report = {"time": time.time() - age, "tokens": 5, "state": "training", "tokens_per_second": 9.0}
        (run_directory / "metrics.jsonl").write_text(json.dumps(report) + "\n")
        assert client.get("/v1/run").json()["silent_seconds"] == pytest.approx(age, abs=60)
        page = client.get("/").text
        assert expected in page and hidden not in page


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("training", "The trainer is the bottleneck: producers wait 100%"),
        ("starved", "The trainer is the bottleneck"),
        ("paused", "The run is paused: nothing is trained until it is resumed."),
        ("draining", "No further activation will come"),
        ("filling", "The buffer is being filled"),
    ],
)
def test_the_bottleneck_is_named_only_while_there_is_one(
    run_directory: Path, client: TestClient, state: str, expected: str
):
    """A person pauses it, and producers wait, but not for the trainer; nor is the time left known then."""
    stream = {"producers": {"working": 1}, "data_wait_ratio": 0.0, "credit_wait_ratio": 1.0}
    report = {"time": time.time(), "tokens": 5, "target_tokens": 9, "state": state, "tokens_per_second": 1.0}
    (run_directory / "metrics.jsonl").write_text(json.dumps(report | {"stream": stream}) + "\n")
    page = client.get("/").text
    assert expected in page
    assert ("is the bottleneck" in page) == (state in ("training", "starved")) == ("</b> left" in page)


def test_a_run_without_producers_is_not_called_slow(run_directory: Path, client: TestClient):
    """It is starved because nobody is at work."""
    report = {"time": time.time(), "tokens": 5, "state": "starved", "stream": {"data_wait_ratio": 1.0}}
    (run_directory / "metrics.jsonl").write_text(json.dumps(report) + "\n")
    page = client.get("/").text
    assert "No producer is at work" in page and "bottleneck" not in page


def test_last_report_is_found_in_a_long_file(run_directory: Path):
    """Only the end of metrics.jsonl is read, however long its lines are."""
    lines = [json.dumps({"tokens": tokens, "pad": "x" * 100_000}) for tokens in range(3)]
    (run_directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert (last_report(run_directory) or {})["tokens"] == 2


def test_snapshots_are_listed_with_their_numbers(run_directory: Path, client: TestClient):
    """The list has metrics and evaluations; a folder without a manifest is not there."""
    empty = {"latest": None, "count": 0, "snapshots": [], "next": None}
    assert client.get("/v1/snapshots").json() == empty
    folder = publish_snapshot(run_directory, 1000)
    publish_snapshot(run_directory, 2000)
    (run_directory / "snapshots" / "000000003000").mkdir()
    replace_text(folder / "small" / "evaluation.json", '{"ce_delta": 0.5}')
    answer = client.get("/v1/snapshots").json()
    assert answer["latest"] == "000000002000"
    assert [entry["name"] for entry in answer["snapshots"]] == ["000000001000", "000000002000"]
    assert answer["snapshots"][0]["saes"]["small"] == {
        "metrics": {"l0": 4.0, "fvu": 0.25, "dead_latents_ratio": None},
        "evaluation": {"ce_delta": 0.5},
    }


def test_file_carries_its_hash_and_never_changes(run_directory: Path, client: TestClient):
    """ETag and Repr-Digest are the sha256 of the bytes, and caches may keep them for ever."""
    publish_snapshot(run_directory, 1000)
    answer = client.get(WEIGHTS)
    digest = hashlib.sha256(answer.content).digest()
    assert answer.headers["etag"] == f'"sha256-{digest.hex()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
    assert "immutable" in answer.headers["cache-control"]
    again = client.get(WEIGHTS, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_head_tells_the_size_without_the_bytes(run_directory: Path, client: TestClient):
    """HEAD has the headers of GET and no body."""
    publish_snapshot(run_directory, 1000)
    whole, head = client.get(WEIGHTS), client.head(WEIGHTS)
    assert head.content == b""
    assert head.headers["content-length"] == str(len(whole.content))
    assert head.headers["etag"] == whole.headers["etag"]


def test_ranges_let_a_download_resume(run_directory: Path, client: TestClient):
    """A range gives those bytes; with another file's tag the whole file comes; beyond the end is 416."""
    publish_snapshot(run_directory, 1000)
    whole = client.get(WEIGHTS)
    size = len(whole.content)
    part = client.get(WEIGHTS, headers={"Range": "bytes=100-", "If-Range": whole.headers["etag"]})
    assert part.status_code == 206 and part.content == whole.content[100:]
    assert part.headers["content-range"] == f"bytes 100-{size - 1}/{size}"
    assert client.get(WEIGHTS, headers={"Range": "bytes=100-", "If-Range": '"other"'}).status_code == 200
    assert client.get(WEIGHTS, headers={"Range": f"bytes={size}-"}).status_code == 416


def test_evaluation_appears_later_and_may_change(run_directory: Path, client: TestClient):
    """evaluation.json is in no manifest: it is served when it is there, and caches must ask again."""
    folder = publish_snapshot(run_directory, 1000)
    address = "/v1/snapshots/000000001000/small/evaluation.json"
    assert "not evaluated" in client.get(address).json()["error"]
    replace_text(folder / "small" / "evaluation.json", '{"ce_delta": 0.5}')
    answer = client.get(address)
    assert answer.json() == {"ce_delta": 0.5}
    assert answer.headers["cache-control"] == "no-cache"


def test_latest_is_the_newest_manifest(run_directory: Path, client: TestClient):
    """Without a snapshot it is a 404 that says so; with one, its manifest, and 204 when nothing is newer."""
    assert "no snapshot yet" in client.get("/v1/snapshots/latest").json()["error"]
    publish_snapshot(run_directory, 1000)
    answer = client.get("/v1/snapshots/latest")
    assert answer.json()["name"] == "000000001000"
    assert answer.content == client.get("/v1/snapshots/000000001000/manifest.json").content
    assert answer.headers["content-location"] == "/v1/snapshots/000000001000/manifest.json"
    assert client.get("/v1/snapshots/latest?after=000000001000").status_code == 204


def test_latest_waits_for_a_newer_one(run_directory: Path):
    """A waiting client hears of the next snapshot as soon as it is published, while others are served."""
    publish_snapshot(run_directory, 1000)
    port, close = start_service(make_app(run_directory, new_registry()), "127.0.0.1", 0)
    try:
        timer = threading.Timer(0.3, publish_snapshot, (run_directory, 2000))
        timer.start()
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/snapshots/latest?after=000000001000&wait=60", timeout=120)
        timer.join()
    finally:
        close()
    assert answer.json()["name"] == "000000002000"
    assert answer.elapsed.total_seconds() < 50  # and not the 60 that it would wait


@pytest.mark.parametrize("query", ["after=yesterday", "wait=soon", "wait=-1", "wait=1e9", "wait=nan"])
def test_nonsense_waits_are_refused(client: TestClient, query: str):
    """400 with what is expected."""
    answer = client.get(f"/v1/snapshots/latest?{query}")
    assert answer.status_code == 400 and "expected" in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/snapshots/000000001000/../../settings.toml",
        "/v1/snapshots/000000001000/%2e%2e/%2e%2e/settings.toml",
        "/v1/snapshots/000000001000/..%2f..%2fsettings.toml",
        "/v1/snapshots/..%2f..%2fdemo/settings.toml",
        "/v1/snapshots/../settings.toml/manifest.json",
        "/v1/snapshots/000000001000//etc/passwd",
        "/v1/snapshots/000000001000/small/",
        "/v1/snapshots/000000001000/secret.txt",
        "/v1/snapshots/LATEST/manifest.json",
        "/v1/snapshots/000000001000/%252e%252e/%252e%252e/settings.toml",
        "/v1/snapshots/000000001000/small/../small/cfg.json",
        "/v1/snapshots/000000001000/small/cfg.json%00.txt",
        "/v1/snapshots/000000001000%00/manifest.json",
        "/v1/snapshots/000000001000/small\\cfg.json",
        "/v1/snapshots/%2e%2e/manifest.json",
        "/v1/snapshots/00000000%d9%a1000/manifest.json",
        "/v1/snapshots/000000001000/pinned",
    ],
)
def test_nothing_outside_of_the_manifest_is_served(run_directory: Path, path: str):
    """Sent raw, as no well-behaved client would: every one is a 404."""
    publish_snapshot(run_directory, 1000)
    (run_directory / "snapshots" / "000000001000" / "secret.txt").write_text("secret")
    port, close = start_service(make_app(run_directory, new_registry()), "127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: plain.recv(65536), b""))
    finally:
        close()
    assert answer.startswith(b"HTTP/1.1 404") and b'"error"' in answer


def test_a_manifest_cannot_lead_out_of_its_folder(run_directory: Path, client: TestClient):
    """Even a manifest that lists ../ paths does not open them."""
    folder = publish_snapshot(run_directory, 1000)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].append({"path": "../../settings.toml", "bytes": 1, "sha256": "00" * 32})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    answer = client.get("/v1/snapshots/000000001000/..%2f..%2fsettings.toml")
    assert answer.status_code == 404 and "outside" in answer.json()["error"]


def test_a_link_out_of_a_snapshot_is_not_followed(run_directory: Path, client: TestClient):
    """Neither for a file that the manifest lists, nor for an evaluation."""
    small = publish_snapshot(run_directory, 1000) / "small"
    (small / "cfg.json").unlink()
    for name in ("cfg.json", "evaluation.json"):
        (small / name).symlink_to(run_directory / "settings.toml")
        assert "outside" in client.get(f"/v1/snapshots/000000001000/small/{name}").json()["error"]


def test_a_list_that_has_not_changed_is_not_sent_again(run_directory: Path, client: TestClient):
    """Who polls sends the tag he has; what changes it is a snapshot, an evaluation or a pin."""
    folder = publish_snapshot(run_directory, 1000)
    tag = client.get("/v1/snapshots").headers["etag"]
    assert client.get("/v1/snapshots", headers={"If-None-Match": tag}).status_code == 304
    pin(run_directory, folder.name)
    answer = client.get("/v1/snapshots", headers={"If-None-Match": tag})
    assert answer.status_code == 200 and answer.json()["snapshots"][0]["pinned"] is True


def test_the_list_comes_in_pages(run_directory: Path, client: TestClient):
    """Each page oldest first, so that the last of the first page is the newest; `next` leads to what came before."""
    for tokens in range(1, 8):
        publish_snapshot(run_directory, 1000 * tokens)
    first = client.get("/v1/snapshots?limit=3").json()
    assert [entry["tokens"] for entry in first["snapshots"]] == [5000, 6000, 7000]
    assert (first["latest"], first["count"]) == ("000000007000", 7)
    second = client.get(first["next"]).json()
    assert [entry["tokens"] for entry in second["snapshots"]] == [2000, 3000, 4000]
    assert (second["latest"], second["count"]) == ("000000007000", 7)
    third = client.get(second["next"]).json()
    assert [entry["tokens"] for entry in third["snapshots"]] == [1000] and third["next"] is None
    assert client.get("/v1/snapshots?before=000000000500").json()["snapshots"] == []
    assert client.get("/v1/snapshots?limit=7").json()["next"] is None
    whole = client.get("/v1/snapshots").json()
    assert [entry["tokens"] for entry in whole["snapshots"]] == [*range(1000, 8000, 1000)] and whole["next"] is None


def test_a_page_is_no_longer_than_it_may_be(run_directory: Path):
    """By default, and whatever is asked for."""
    for tokens in range(1, 6):
        publish_snapshot(run_directory, 1000 * tokens)
    client = TestClient(make_app(run_directory, new_registry(), page_sizes=PageSizes(default=2, most=4)))
    assert len(client.get("/v1/snapshots").json()["snapshots"]) == 2
    assert len(client.get("/v1/snapshots?limit=5").json()["snapshots"]) == 4


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=many", "limit=1e3", "limit=99999999999", "limit=", "before=x", "before="]
)
def test_nonsense_pages_are_refused(client: TestClient, query: str):
    """400 with the value and what is expected."""
    answer = client.get(f"/v1/snapshots?{query}")
    assert answer.status_code == 400 and "expected" in answer.json()["error"]


def test_the_page_does_not_grow_with_the_history(run_directory: Path, client: TestClient):
    """It shows the newest, says how many came before, and knows an evaluation that is older than what it shows."""
    first = publish_snapshot(run_directory, 1000)
    replace_text(first / "small" / "evaluation.json", '{"ce_delta": 0.4321}')
    for tokens in range(2, 24):
        publish_snapshot(run_directory, 1000 * tokens)
    page = client.get("/").text
    assert "0.4321" in page and "3 older snapshots" in page
    assert "/v1/snapshots/000000004000/manifest.json" in page and "/v1/snapshots/000000003000/" not in page


def test_a_snapshot_that_is_a_link_is_none(run_directory: Path, client: TestClient, tmp_path: Path):
    """Neither listed nor served, whether it leads out of the run or to another of its snapshots."""
    publish_snapshot(run_directory, 1000)
    outside = publish_snapshot(start_run(tmp_path / "other"), 2000)
    (run_directory / "snapshots" / "000000002000").symlink_to(outside)
    (run_directory / "snapshots" / "000000003000").symlink_to("000000001000")
    answer = client.get("/v1/snapshots").json()
    assert answer["latest"] == "000000001000" and answer["count"] == 1
    assert client.get("/v1/run").json()["latest"] == "000000001000"
    assert snapshot_names(run_directory) == ["000000001000"]
    for name in ("000000002000", "000000003000"):
        for path in ("manifest.json", "small/cfg.json", "small/evaluation.json"):
            assert client.get(f"/v1/snapshots/{name}/{path}").status_code == 404


def test_nothing_is_read_through_a_link_out_of_the_run(run_directory: Path, client: TestClient, tmp_path: Path):
    """A manifest, an SAE's folder, an evaluation, and the files of the run itself."""
    (tmp_path / "secret.json").write_text('{"format": 1, "tokens": 7, "secret": "swordfish"}')
    (tmp_path / "secret.toml").write_text('secret = "swordfish"')
    manifest = publish_snapshot(run_directory, 1000) / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(tmp_path / "secret.json")
    small = publish_snapshot(run_directory, 2000) / "small"
    small.rename(tmp_path / "small")
    small.symlink_to(tmp_path / "small")
    evaluated = publish_snapshot(run_directory, 3000) / "small" / "evaluation.json"
    evaluated.symlink_to(tmp_path / "secret.json")
    for name in ("summary.json", "metrics.jsonl"):
        (run_directory / name).symlink_to(tmp_path / "secret.json")
    (run_directory / "settings.toml").unlink()
    (run_directory / "settings.toml").symlink_to(tmp_path / "secret.toml")
    snapshots = client.get("/v1/snapshots").json()["snapshots"]
    assert [(entry["name"], entry["saes"]["small"]["evaluation"]) for entry in snapshots] == [("000000003000", None)]
    assert client.get("/v1/snapshots/000000002000/small/cfg.json").status_code == 404
    assert client.get("/v1/snapshots/000000001000/manifest.json").status_code == 404
    for path in ("/", "/parts", "/v1/run", "/v1/snapshots", "/v1/history", "/v1/latents"):
        answer = client.get(path)
        assert answer.status_code == 200 and "swordfish" not in answer.text


def test_the_folder_of_snapshots_may_be_on_another_disk(run_directory: Path, client: TestClient, tmp_path: Path):
    """An operator's own link: the run directory, and the folder `snapshots` in it."""
    publish_snapshot(run_directory, 1000)
    (run_directory / "snapshots").rename(tmp_path / "elsewhere")
    (run_directory / "snapshots").symlink_to(tmp_path / "elsewhere")
    run_directory.rename(tmp_path / "moved")
    run_directory.symlink_to(tmp_path / "moved")
    assert client.get("/v1/snapshots").json()["count"] == 1
    assert client.get(WEIGHTS).status_code == 200


@pytest.fixture
def closed(run_directory: Path) -> TestClient:
    """A service that asks for its token."""
    publish_snapshot(run_directory, 1000)
    app = make_app(run_directory, new_registry(), token=TOKEN)
    return TestClient(app, "http://monitor", follow_redirects=False)


def test_with_a_token_only_the_pulse_is_public(closed: TestClient):
    """Every address but /healthz answers 401 and how to ask, also where there is nothing."""
    assert closed.get("/healthz").status_code == 200
    for path in ("/", "/v1/run", "/v1/snapshots", "/v1/snapshots/latest", WEIGHTS, "/metrics", "/readyz", "/nothing"):
        answer = closed.get(path)
        assert answer.status_code == 401 and "Authorization: Bearer" in answer.json()["error"]
        assert answer.headers["www-authenticate"] == "Bearer"
        assert closed.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code in (200, 404)


@pytest.mark.parametrize(
    "header", [f"Bearer {TOKEN}x", TOKEN, "Bearer", "Bearer ü", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}"]
)
def test_another_token_opens_nothing(closed: TestClient, header: str):
    """Longer, shorter, of another scheme, not ASCII: no server error either."""
    assert closed.get("/v1/run", headers={"Authorization": header.encode()}).status_code == 401


def test_a_browser_shows_the_token_once(closed: TestClient):
    """?token= is exchanged for a cookie that scripts cannot read, that other sites do not send and that is not it."""
    form = closed.get("/", headers={"Accept": "text/html"})
    assert form.status_code == 401 and 'name="token"' in form.text
    welcome = closed.get(f"/v1/snapshots?token={TOKEN}&page=2")
    assert 'content="0;url=/v1/snapshots?page=2"' in welcome.text and TOKEN not in welcome.text
    cookie = welcome.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert welcome.headers["cache-control"] == "no-store"
    assert closed.get("/").status_code == 200  # the client keeps cookies
    name = next(iter(closed.cookies))
    closed.cookies.clear()
    assert closed.get("/", headers={"Cookie": f"{name}={TOKEN}"}).status_code == 401


def test_the_token_leads_to_no_other_host(closed: TestClient):
    """An address that a browser would take for another host's becomes one of this host."""
    for path in ("//evil.example/", "/\\evil.example/", "/%0a//evil.example"):
        page = closed.get(f"http://monitor{path}?token={TOKEN}").text
        target = page.split("0;url=")[1].split('"')[0]
        assert target.startswith("/") and not target.startswith(("//", "/\\"))


@pytest.mark.parametrize("content", [None, "", "short", "two words of a sentence", "ü" * 20])
def test_a_token_file_that_is_none_is_refused(tmp_path: Path, content: str | None):
    """The error says how to make one."""
    if content is not None:
        (tmp_path / "token").write_text(content)
    with pytest.raises(TokenError, match="openssl rand"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["monitor.host=0.0.0.0"], "monitor.token_file is not set"), (["monitor.token_file=nowhere"], "openssl rand")],
)
def test_off_loopback_it_does_not_start_without_a_token(tmp_path: Path, overrides: list[str], message: str):
    """Exit code 2 and what to do, from the real command."""
    (tmp_path / "run.toml").write_text(f'[run]\ndirectory = "{tmp_path}/run"\n[monitor]\nport = 0\nservice_port = 0\n')
    command = [sys.executable, "-m", "monitor", str(tmp_path / "run.toml"), *overrides]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and message in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("command", [[], ["pull"], ["top"]], ids=["monitor", "pull", "top"])
def test_help_is_light(command: list[str]):
    """No torch, no web server, no HTTP client, nothing to draw with."""
    heavy = {"torch", "numpy", "uvicorn", "httpx", "rich"}
    code = (
        f"import sys; from monitor.__main__ import main\ntry: main({[*command, '--help']})\n"
        f"except SystemExit: print({heavy} & {{*sys.modules}})"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout.splitlines()[-1] == "set()"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]):
    """Every command beside the monitor has a help of its own."""
    with pytest.raises(SystemExit, match="0"):
        monitor.__main__.main(["--help"])
    help_text = capsys.readouterr().out
    for command in ("pull", "top", "compare"):
        assert f"-m monitor {command}" in help_text
        with pytest.raises(SystemExit, match="0"):
            monitor.__main__.main([command, "--help"])


def test_the_service_gives_way(run_directory: Path):
    """Its threads have the lowest priority, those of the process' other work keep theirs."""
    before = {thread.name for thread in Path("/proc/self/task").iterdir()}
    _, close = start_service(make_app(run_directory, new_registry()), "127.0.0.1", 0)
    try:
        new = {int(thread.name) for thread in Path("/proc/self/task").iterdir()} - {int(name) for name in before}
        lowest = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 19)
        assert new and {os.getpriority(os.PRIO_PROCESS, thread) for thread in new} == {lowest}
    finally:
        close()


def test_many_who_wait_cost_little(run_directory: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder is listed when it has changed, not for every look of every client that waits."""
    os.utime(publish_snapshot(run_directory, 1000).parent, (1.0, 1.0))
    scans: list[Path] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scan(path))
    client = TestClient(make_app(run_directory, new_registry()))
    client.get("/v1/snapshots/latest?after=000000001000&wait=1")
    assert len(scans) == 1


def test_errors_say_what_exists(run_directory: Path, client: TestClient):
    """Wrong snapshot, wrong file, wrong page, wrong method: each answer helps."""
    publish_snapshot(run_directory, 1000)
    assert "000000001000" in client.get("/v1/snapshots/000000000001/manifest.json").json()["error"]
    assert "small/cfg.json" in client.get("/v1/snapshots/000000001000/big/cfg.json").json()["error"]
    assert "/v1/snapshots" in client.get("/v2").json()["error"]
    answer = client.post("/v1/run")
    assert answer.status_code == 405 and "only reads" in answer.json()["error"]


def test_retired_snapshot_is_gone(run_directory: Path, client: TestClient):
    """After retention the old one is a 404 and the newer one stays."""
    publish_snapshot(run_directory, 1000)
    assert client.get(WEIGHTS).status_code == 200
    publish_snapshot(run_directory, 2000)
    retire(run_directory, keep=1)
    assert client.get(WEIGHTS).status_code == 404
    assert client.get(WEIGHTS.replace("1000", "2000")).status_code == 200


def test_metrics_and_health_are_on_the_service_too(run_directory: Path):
    """One port is enough for a small installation; an unhealthy monitor says why."""
    client = TestClient(make_app(run_directory, new_registry(), lambda: "evaluation hangs"))
    assert "process_cpu_seconds_total" in client.get("/metrics").text
    answer = client.get("/healthz")
    assert answer.status_code == 503 and answer.json()["error"] == "evaluation hangs"


def test_page_shows_the_run_and_links_to_its_files(run_directory: Path, client: TestClient):
    """Numbers of the newest snapshot, a dash where nothing is known, a working link for every file."""
    folder = publish_snapshot(run_directory, 1234567)
    replace_text(folder / "small" / "evaluation.json", '{"ce_delta": 0.0123, "ce_recovered": 0.985, "kl": null}')
    page = client.get("/").text
    assert "1,234,567" in page and "0.2500" in page and "0.0123" in page and "0.9850" in page and "–" in page
    links = [part.split('"')[0] for part in page.split('href="/')[1:]]
    assert "v1/snapshots/000001234567/small/cfg.json" in links
    assert all(client.get(f"/{link}").status_code == 200 for link in links)


def test_page_shows_where_each_sae_sits(run_directory: Path, client: TestClient):
    """Reads → writes for a transcoder, all hooks of a crosscoder, and an averaged copy without numbers of training."""
    exports = [identity_sae(name) for name in ("plain", "trans", "cross", "plain-ema")]
    for export, numbers in zip(
        exports,
        (
            {"hook": "blocks.0.hook_resid_post", "architecture": "batchtopk", "d_sae": 4096},
            {"hook": "blocks.1.hook_resid_mid", "target": "blocks.1.hook_mlp_out"},
            {"hook": "blocks.2.hook_mlp_out", "hooks": ["blocks.2.hook_mlp_out", "blocks.3.hook_mlp_out"]},
            {"hook": "blocks.0.hook_resid_post", "l0": None, "fvu": None, "dead_latents_ratio": None},
        ),
        strict=True,
    ):
        export.metrics.update(numbers)
    publish_snapshot(run_directory, 1000, exports)
    page = client.get("/").text
    plain = page.split("</span>plain</td>")[1].split("</tr>")[0]
    assert ">batchtopk<" in plain and ">4,096<" in plain and ">blocks.0.hook_resid_post<" in plain
    assert "blocks.1.hook_resid_mid → blocks.1.hook_mlp_out" in page
    assert "blocks.2.hook_mlp_out + blocks.3.hook_mlp_out" in page
    averaged = page.split("</span>plain-ema</td>")[1].split("</tr>")[0]
    assert averaged.count("–") == 12
    saes = client.get("/v1/snapshots").json()["snapshots"][0]["saes"]
    assert saes["trans"]["metrics"]["target"] == "blocks.1.hook_mlp_out" and saes["plain-ema"]["evaluation"] is None


def test_saes_come_and_go_between_snapshots(run_directory: Path, client: TestClient):
    """Each snapshot serves the SAEs it has, and the page shows those of the newest."""
    publish_snapshot(run_directory, 1000, [identity_sae("first"), identity_sae("second")])
    publish_snapshot(run_directory, 2000, [identity_sae("first"), identity_sae("third")])
    entries = client.get("/v1/snapshots").json()["snapshots"]
    assert [list(entry["saes"]) for entry in entries] == [["first", "second"], ["first", "third"]]
    assert client.get("/v1/snapshots/000000001000/second/cfg.json").status_code == 200
    assert client.get("/v1/snapshots/000000002000/second/cfg.json").status_code == 404
    page = client.get("/").text
    assert "</span>third</td>" in page and "</span>second</td>" not in page


def test_page_escapes_what_files_say(run_directory: Path, client: TestClient):
    """Text from settings cannot become markup."""
    replace_text(run_directory / "settings.toml", '[model]\nname = "<script>alert(1)</script>"\nhooks = []\n')
    publish_snapshot(run_directory, 1000, [identity_sae("a&b")])
    page = client.get("/").text
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "a&amp;b" in page


def test_occupied_port_is_named(run_directory: Path):
    """The error says which port and which setting."""
    app = make_app(run_directory, new_registry())
    port, close = start_service(app, "127.0.0.1", 0)
    try:
        with pytest.raises(OSError, match=rf"{port}.*monitor.service_port"):
            start_service(app, "127.0.0.1", port)
    finally:
        close()
