"""Pulling a snapshot: from a real server, over real sockets, cut off and damaged on purpose."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from monitor.cli.client import Monitor
from monitor.cli.download import OnProgress, _newer, follow, pull
from monitor.cli.errors import MonitorError
from monitor.cli.pull import main
from monitor.http.service import PageSizes, make_app, start_service
from producer.common.metrics import new_registry
from tests.small_run import Export, finish_run, identity_sae, publish_snapshot, start_run
from trainer.snapshot import FileParts, new_snapshot, part_sha256, retire, snapshot_name, verify
from trainer.state.durable import replace_text

ROOT = Path(__file__).parent.parent
TOKEN = "correct-horse-battery-staple"
WEIGHTS = "small/sae_weights.safetensors"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run with one snapshot, of 1000 tokens."""
    directory = start_run(tmp_path / "demo")
    publish_snapshot(directory, 1000)
    return directory


@pytest.fixture
def url(run_directory: Path) -> Iterator[str]:
    port, close = start_service(make_app(run_directory, new_registry()), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}"
    close()


def test_newest_snapshot_arrives_whole(run_directory: Path, url: str, tmp_path: Path):
    """Every byte of every file, under the snapshot's own name, and nothing half done beside it."""
    publish_snapshot(run_directory, 2000)
    folder = pull(Monitor(url), tmp_path / "here")
    assert folder == tmp_path / "here" / "000000002000"
    assert _contents(folder) == _contents(run_directory / "snapshots" / "000000002000")
    assert [path.name for path in folder.parent.iterdir()] == ["000000002000"]


def test_evaluation_comes_along(run_directory: Path, url: str, tmp_path: Path):
    """It is in no manifest, and is fetched when it is there."""
    replace_text(run_directory / "snapshots" / "000000001000" / "small" / "evaluation.json", '{"ce_delta": 0.5}')
    folder = pull(Monitor(url), tmp_path / "here")
    assert json.loads((folder / "small" / "evaluation.json").read_text()) == {"ce_delta": 0.5}
    verify(folder)


def test_averaged_copies_come_along(run_directory: Path, url: str, tmp_path: Path):
    """NAME-ema is one more SAE of the snapshot, its evaluation included."""
    source = publish_snapshot(run_directory, 2000, [identity_sae("small"), identity_sae("small-ema")])
    replace_text(source / "small-ema" / "evaluation.json", '{"ce_delta": 0.5}')
    assert _contents(pull(Monitor(url), tmp_path / "here")) == _contents(source)


def test_a_snapshot_by_name(run_directory: Path, url: str, tmp_path: Path):
    """An older one can be asked for; one that does not exist is an error that says what exists."""
    publish_snapshot(run_directory, 2000)
    assert pull(Monitor(url), tmp_path / "here", "000000001000").name == "000000001000"
    with pytest.raises(MonitorError, match="there are 2, 000000001000 to 000000002000"):
        pull(Monitor(url), tmp_path / "here", "000000000500")


def test_whole_snapshot_is_not_fetched_again(url: str, tmp_path: Path):
    """The second pull reads nothing but the manifest."""
    paths: list[str] = []
    pull(Monitor(url), tmp_path / "here", on_progress=lambda path, done, size: paths.append(path))
    assert WEIGHTS in paths
    paths.clear()
    pull(Monitor(url), tmp_path / "here", on_progress=lambda path, done, size: paths.append(path))
    assert paths == []


def test_half_a_file_is_resumed(run_directory: Path, url: str, tmp_path: Path):
    """What an interrupted pull has left is kept: only the rest crosses the network."""
    source = publish_snapshot(run_directory, 2000, [_large_sae()]) / WEIGHTS
    half = source.stat().st_size // 2
    part = tmp_path / "here" / ".part-000000002000" / f"{WEIGHTS}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(source.read_bytes()[:half])
    sizes: list[int] = []

    def on_progress(path: str, received: int, size: int) -> None:
        if path == WEIGHTS:
            sizes.append(received)

    verify(pull(Monitor(url), tmp_path / "here", on_progress=on_progress))
    assert half < sizes[0] <= half + 65536 and sizes == sorted(sizes) and sizes[-1] == source.stat().st_size


def test_half_a_wrong_file_is_fetched_anew(run_directory: Path, url: str, tmp_path: Path):
    """When what was left turns out not to fit, the file comes again from its start."""
    part = tmp_path / "here" / ".part-000000001000" / f"{WEIGHTS}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"not the beginning of it")
    verify(pull(Monitor(url), tmp_path / "here"))


def test_broken_connections_do_not_start_over(run_directory: Path, url: str, tmp_path: Path):
    """Through a line that breaks after 400 kB, a file of 1.2 MB arrives whole, in pieces."""
    publish_snapshot(run_directory, 2000, [_large_sae()])
    with _breaking_line(int(url.rpartition(":")[2]), after_bytes=400_000) as port:
        verify(pull(Monitor(f"127.0.0.1:{port}"), tmp_path / "here", pause_seconds=0.01))


def test_a_file_in_parts_goes_on_at_the_first_part_that_is_not_right(run_directory: Path, url: str, tmp_path: Path):
    """Of four parts the first is here and right, the second damaged: the second on are fetched, in one request each."""
    source = _publish_in_parts(run_directory, 2000, part_bytes=400_000)
    partial = tmp_path / "here" / ".part-000000002000" / f"{WEIGHTS}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(source.read_bytes()[:600_000] + b"damaged" + source.read_bytes()[600_007:900_000])
    sizes: list[int] = []

    def on_progress(path: str, received: int, size: int) -> None:
        if path == WEIGHTS:
            sizes.append(received)

    folder = pull(Monitor(url), tmp_path / "here", on_progress=on_progress)

    verify(folder)
    assert (folder / WEIGHTS).read_bytes() == source.read_bytes()
    assert 400_000 < sizes[0] <= 400_000 + 262_144 and sizes == sorted(sizes) and sizes[-1] == source.stat().st_size


def test_a_damaged_part_is_named(run_directory: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The parts before it stay, so that a mended server is not asked for them again."""
    source = _publish_in_parts(run_directory, 2000, part_bytes=400_000)
    whole = source.read_bytes()
    source.write_bytes(whole[:500_000] + b"damaged" + whole[500_007:])

    assert main([url, "--to", str(tmp_path / "here")]) == 1
    assert "(bytes 400,000 to 800,000" in capsys.readouterr().err
    partial = tmp_path / "here" / ".part-000000002000" / f"{WEIGHTS}.part"
    assert partial.read_bytes() == whole[:400_000]


def test_damaged_file_is_refused(run_directory: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file whose bytes are not the manifest's never gets its name; the command ends with 1 and says which file."""
    source = run_directory / "snapshots" / "000000001000" / WEIGHTS
    damaged = bytearray(source.read_bytes())
    damaged[-1] ^= 1
    source.write_bytes(damaged)
    assert main([url, "--to", str(tmp_path / "here")]) == 1
    assert "sae_weights.safetensors differs" in capsys.readouterr().err
    assert not (tmp_path / "here" / "000000001000").exists()


def test_snapshot_retired_under_way_gives_way_to_the_newest(run_directory: Path, url: str, tmp_path: Path):
    """Retention may win the race; the pull then brings the newer snapshot, and leaves no rest of the old."""

    def retire_it(path: str, received: int, size: int) -> None:
        if len(list((run_directory / "snapshots").glob("0*"))) == 1:
            publish_snapshot(run_directory, 2000)
            retire(run_directory, keep=1)

    folder = pull(Monitor(url), tmp_path / "here", on_progress=retire_it)
    assert folder.name == "000000002000"
    assert [path.name for path in folder.parent.iterdir()] == ["000000002000"]
    verify(folder)


def test_another_runs_snapshot_is_not_mixed_in(run_directory: Path, url: str, tmp_path: Path):
    """Two runs reach the same count of tokens; the second is refused, not merged."""
    publish_snapshot(tmp_path, 1000, [identity_sae("small", gain=2.0)])
    with pytest.raises(MonitorError, match="another run"):
        pull(Monitor(url), tmp_path / "snapshots")


@pytest.mark.parametrize(
    "path",
    ["../evil", "/tmp/evil", "small/../../evil", "manifest.json", "", "..\\evil", "C:evil", "small/file:stream"],
)
def test_manifest_that_leads_out_of_the_folder_is_refused(
    run_directory: Path, url: str, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
):
    """The server is not trusted with paths on this machine."""
    monkeypatch.setattr("monitor.snapshot_index.is_within", lambda path, folder: True)  # ours would not serve it
    manifest = run_directory / "snapshots" / "000000001000" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"].append({"path": path, "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()})
    manifest.write_text(json.dumps(document))
    with pytest.raises(MonitorError, match="refused"):
        pull(Monitor(url), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_command_prints_the_folder(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """stdout is the folder and nothing else, so that a script can use it."""
    assert main([url.removeprefix("http://"), "--to", str(tmp_path / "here")]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'here' / '000000001000'}\n"
    assert "small/sae_weights.safetensors  " in output.err  # in a pipe, a line for each file as it comes


def test_wrong_usage_is_2_and_no_server_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What the operator typed wrongly differs from what is not there."""
    assert main(["ftp://example.org", "--to", str(tmp_path)]) == 2
    assert main(["127.0.0.1:1", "--to", str(tmp_path), "--name", "yesterday"]) == 2
    assert main(["127.0.0.1:1", "--to", str(tmp_path)]) == 1
    assert "is the monitor running there?" in capsys.readouterr().err


def test_another_kind_of_server_is_recognised(tmp_path: Path):
    """JSON that is no manifest, or a 404 that says nothing, is refused with a hint about the address."""
    for status in (b"200 OK", b"404 Not Found"):
        with (
            _answering(b"[]", status) as port,
            pytest.raises(MonitorError, match="is this the address of a Sluice monitor"),
        ):
            pull(Monitor(f"127.0.0.1:{port}"), tmp_path)


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"502 Bad Gateway", b"503 Service Unavailable"])
def test_a_server_that_is_busy_is_asked_again(status: bytes):
    """It is broken for now, as a line is, and not a refusal."""
    with _answering(b'{"error": "later"}', status) as port, pytest.raises(ConnectionError, match="later"):
        Monitor(f"127.0.0.1:{port}").read("/v1/run")


def test_the_token_is_sent_and_never_shown(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """From SLUICE_TOKEN or --token; without it the refusal says so."""
    port, close = start_service(make_app(run_directory, new_registry(), token=TOKEN), "127.0.0.1", 0)
    try:
        assert main([f"127.0.0.1:{port}", "--to", str(tmp_path / "here")]) == 1
        assert "SLUICE_TOKEN" in capsys.readouterr().err
        assert main([f"127.0.0.1:{port}", "--to", str(tmp_path / "here"), "--token", TOKEN]) == 0
        monkeypatch.setenv("SLUICE_TOKEN", TOKEN)
        assert main([f"127.0.0.1:{port}", "--to", str(tmp_path / "there")]) == 0
        assert main([f"127.0.0.1:{port}", "--name", "000000000001"]) == 1
        assert TOKEN not in "".join(capsys.readouterr())
    finally:
        close()


def test_the_token_is_not_carried_to_another_host(tmp_path: Path):
    """Where a server redirects to, it does not go."""
    requests: list[bytes] = []

    def listen_in(client: socket.socket) -> None:
        with client:
            requests.append(client.recv(65536))
            client.sendall(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n")

    with _listening(listen_in) as other:

        def redirect(client: socket.socket) -> None:
            with client:
                requests.append(client.recv(65536))
                client.sendall(
                    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\nConnection: close\r\n\r\n" % other
                )

        with _listening(redirect) as port, pytest.raises(MonitorError):
            pull(Monitor(f"127.0.0.1:{port}", TOKEN), tmp_path)
    assert len(requests) == 2 and TOKEN.encode() in requests[0] and TOKEN.encode() not in requests[1]


def test_following_brings_each_snapshot_in_turn(run_directory: Path, url: str, tmp_path: Path):
    """From the newest on, in order, those that came while another was fetched too; the end of the run ends it."""
    publish_snapshot(run_directory, 2000)
    names: list[str] = []

    def arrive(folder: Path) -> None:
        names.append(folder.name)
        if len(names) == 1:
            publish_snapshot(run_directory, 3000)
            publish_snapshot(run_directory, 4000)
            finish_run(run_directory, 4000)

    follow(Monitor(url), tmp_path / "here", _silent, arrive, print)
    assert names == ["000000002000", "000000003000", "000000004000"]


def test_following_goes_on_after_what_is_there(run_directory: Path, url: str, tmp_path: Path):
    """What came while nobody followed is fetched as well, and evaluations that have come since."""
    pull(Monitor(url), tmp_path / "here")
    for tokens in (2000, 3000):
        publish_snapshot(run_directory, tokens)
    finish_run(run_directory, 3000)
    names: list[str] = []

    def arrive(folder: Path) -> None:
        names.append(folder.name)
        evaluation = run_directory / "snapshots" / folder.name / "small" / "evaluation.json"
        replace_text(evaluation, '{"ce_delta": 0.5}')

    follow(Monitor(url), tmp_path / "here", _silent, arrive, print)
    assert names == ["000000002000", "000000003000"]
    assert (tmp_path / "here" / "000000003000" / "small" / "evaluation.json").read_text() == '{"ce_delta": 0.5}'


@pytest.mark.parametrize("after", ["", "000000001000", "000000004000", "000000006000"])
def test_what_is_newer_is_gathered_from_all_pages(run_directory: Path, after: str):
    """The list comes in pages of two here; only as many are asked for as are needed."""
    for tokens in range(2000, 7000, 1000):
        publish_snapshot(run_directory, tokens)
    expected = [f"{tokens:012d}" for tokens in range(1000, 7000, 1000)]
    app = make_app(run_directory, new_registry(), page_sizes=PageSizes(default=2))
    port, close = start_service(app, "127.0.0.1", 0)
    try:
        newer = _newer(Monitor(f"127.0.0.1:{port}"), after)
    finally:
        close()
    assert newer == ([name for name in expected if name > after] if after else expected[-1:])


def test_following_passes_over_what_is_retired_under_it(run_directory: Path, url: str, tmp_path: Path):
    """The snapshot that was being fetched is given up, nothing of it is left, and the next one comes."""

    @contextmanager
    def retiring() -> Iterator[OnProgress]:
        def on_progress(path: str, received: int, size: int) -> None:
            if not (run_directory / "snapshots" / "000000002000").exists():
                publish_snapshot(run_directory, 2000)
                retire(run_directory, keep=1)
                finish_run(run_directory, 2000)

        yield on_progress

    names: list[str] = []
    follow(Monitor(url), tmp_path / "here", retiring, lambda folder: names.append(folder.name), print)
    assert names == ["000000002000"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["000000002000"]


def test_following_survives_a_killed_monitor(tmp_path: Path):
    """Real processes: the monitor is killed, snapshots come and go meanwhile, and it is started again."""
    directory = start_run(tmp_path / "demo")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_file = tmp_path / "run.toml"
    run_file.write_text(f'[run]\ndirectory = "{directory}"\n[monitor]\nport = 0\nservice_port = {port}\n')
    command = [sys.executable, "-m", "monitor"]
    publish_snapshot(directory, 1000)
    with ExitStack() as stack:
        first = stack.enter_context(_killed_at_last([*command, str(run_file)]))
        following = [*command, "pull", f"127.0.0.1:{port}", "--to", str(tmp_path / "here"), "--follow"]
        puller = stack.enter_context(_killed_at_last(following))
        assert puller.stdout is not None
        assert puller.stdout.readline().strip() == str(tmp_path / "here" / "000000001000")
        first.kill()
        first.wait()
        for tokens in (2000, 3000):
            publish_snapshot(directory, tokens)
            retire(directory, keep=1)
        finish_run(directory, 3000)
        stack.enter_context(_killed_at_last([*command, str(run_file)]))
        assert puller.stdout.read().split() == [str(tmp_path / "here" / "000000003000")]
        assert puller.wait(120) == 0
    verify(tmp_path / "here" / "000000003000")


@pytest.mark.skipif(not all(map(shutil.which, ("curl", "awk", "sha256sum"))), reason="curl or coreutils are missing")
def test_curl_is_enough(run_directory: Path, url: str, tmp_path: Path):
    """The lines of docs/snapshots.md: everything arrives, half a file is gone on with, hashes are checked."""
    assert _recipe(url, tmp_path).returncode == 0
    weights = tmp_path / "000000001000" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    process = _recipe(url, tmp_path)
    assert process.returncode == 0 and process.stdout.count(": OK") == 4
    weights.write_bytes(b"x" * weights.stat().st_size)
    assert _recipe(url, tmp_path).returncode != 0


@pytest.mark.skipif(not all(map(shutil.which, ("curl", "awk", "sha256sum"))), reason="curl or coreutils are missing")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"small/cfg.json"', '"../../stolen"'),
        ('"small/cfg.json"', '"small/../../../stolen"'),
        ('"small/cfg.json"', '"/tmp/x -o ../stolen"'),
        ('"name": "000000001000"', '"name": ".."'),
        ('"name": "000000001000"', '"name": ""'),
        ('"sha256": "', '"sha256": "0 ../stolen '),
    ],
)
def test_curl_is_led_nowhere_else(run_directory: Path, tmp_path: Path, old: str, new: str):
    """By a monitor whose manifest names files outside of the snapshot's folder: nothing is fetched, and it fails."""
    text = (run_directory / "snapshots" / "000000001000" / "manifest.json").read_text()
    assert old in text
    requests: list[str] = []

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.replace(old, new).encode() if self.path.endswith("latest") else b"stolen")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Evil) as evil:
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        (tmp_path / "deep" / "here").mkdir(parents=True)
        process = _recipe(f"http://127.0.0.1:{evil.server_port}", tmp_path / "deep" / "here")
        evil.shutdown()
    assert process.returncode != 0 and requests == ["/v1/snapshots/latest"]
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["here", "manifest.json"]


def _recipe(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The lines of docs/snapshots.md, as they stand there."""
    page = (ROOT / "docs" / "snapshots.md").read_text()
    lines = page[page.index("    curl -fsS $MONITOR") :].split("\n\n")[0]
    environment = os.environ | {"MONITOR": url}
    return subprocess.run(["bash", "-c", lines], cwd=folder, env=environment, capture_output=True, text=True)


@contextmanager
def _silent() -> Iterator[OnProgress]:
    yield lambda path, done, size: None


@contextmanager
def _killed_at_last(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _large_sae() -> Export:
    """An SAE whose weights take 1.2 MB, so that they cross in several pieces."""
    return identity_sae("small", d_in=int(np.sqrt(1.2e6 / 16)))


def _publish_in_parts(directory: Path, tokens: int, part_bytes: int) -> Path:
    """A snapshot whose weights have a hash for each part; returns their file."""
    sae = _large_sae()
    with new_snapshot(directory, tokens, {}) as draft:
        sae.write(draft)
        path = draft.folder / WEIGHTS
        hashes = [part_sha256(path, begin, part_bytes) for begin in range(0, path.stat().st_size, part_bytes)]
        draft.add("small", sae.metrics, FileParts(part_bytes, tuple(hashes)))
    return directory / "snapshots" / snapshot_name(tokens) / WEIGHTS


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def _breaking_line(port: int, after_bytes: int) -> Iterator[int]:
    """A relay to `port` that hangs up once so many bytes of one connection have passed."""

    def relay(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server, suppress(OSError):
            server.sendall(client.recv(65536))
            passed = 0
            while passed < after_bytes and (piece := server.recv(min(65536, after_bytes - passed))):
                client.sendall(piece)
                passed += len(piece)

    with _listening(relay) as own:
        yield own


@contextmanager
def _answering(body: bytes, status: bytes) -> Iterator[int]:
    def answer(client: socket.socket) -> None:
        with client:
            client.recv(65536)
            head = b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
            client.sendall(head + body)

    with _listening(answer) as port:
        yield port


@contextmanager
def _listening(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
