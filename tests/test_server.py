"""What strangers may take of a port that speaks HTTP: the snapshot service's and the metrics' alike."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from monitor.http.service import make_app, start_service
from producer.common import server
from producer.common.metrics import new_registry, start_metrics_server
from producer.common.run_file import read_run_file
from producer.common.server import DEFAULT_LIMITS, ServerLimits
from producer.common.toml import SettingsError
from tests.small_processes import wait_until
from tests.small_run import publish_snapshot, start_run
from trainer.settings import TrainerSettings

HALF = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Half: "
TOKEN = "correct-horse-battery-staple"

Start = Callable[..., int]
"""Starts a server with the options given; returns its port."""


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    run = start_run(tmp_path / "demo")
    publish_snapshot(run, 1000)
    return run


@pytest.fixture(params=["service", "metrics"])
def start(request: pytest.FixtureRequest, run_directory: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(allowed_hosts: tuple[str, ...] = (), limits: ServerLimits = DEFAULT_LIMITS) -> int:
            registry = new_registry()
            if request.param == "service":
                app = make_app(run_directory, registry)
                port, close = start_service(app, "127.0.0.1", 0, lambda: False, allowed_hosts, limits)
            else:
                port, close = start_metrics_server(registry, "127.0.0.1", 0, allowed_hosts=allowed_hosts, limits=limits)
            stack.callback(close)
            return port

        yield begin


def connect(port: int, request: bytes = HALF) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=60)
    plain.sendall(request)
    return plain


def is_open(plain: socket.socket) -> bool:
    """Whether the other side has neither ended nor reset the connection."""
    plain.setblocking(False)
    try:
        return plain.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def ask(port: int, path: str = "/healthz", **headers: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=60)


def test_half_requests_lock_nobody_out(start: Start):
    """Of 40 half requests no more stay than there is room for, who asks is served, and soon all of them are gone."""
    port = start(limits=ServerLimits(head_seconds=1.5, connections=8))
    half = [connect(port) for _ in range(40)]
    assert ask(port).status_code == 200
    assert sum(map(is_open, half)) <= 8
    wait_until(lambda: not any(map(is_open, half)))


@pytest.mark.parametrize(
    "sent",
    [
        HALF,
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTTP/1.1\r\nX: ",
    ],
    ids=["head", "nothing", "body", "second request"],
)
def test_a_request_that_trickles_in_is_cut_off(sent: bytes):
    """A byte now and then does not earn more time: neither for a head, a body, nor a second request."""
    port, close = start_metrics_server(new_registry(), "127.0.0.1", 0, limits=ServerLimits(head_seconds=0.5))
    with connect(port, sent) as plain:
        deadline = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                plain.sendall(b"x")
                time.sleep(0.1)
    close()


def test_those_who_wait_for_a_snapshot_lock_nobody_out(run_directory: Path):
    """With every place taken by a request that is served, the one that has got nothing for longest gives way."""
    app = make_app(run_directory, new_registry())
    port, close = start_service(app, "127.0.0.1", 0, lambda: False, limits=ServerLimits(connections=4))
    try:
        wait = b"GET /v1/snapshots/latest?after=000000001000&wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        waiting = [connect(port, wait) for _ in range(4)]
        time.sleep(0.3)
        assert ask(port).status_code == 200
        assert [is_open(plain) for plain in waiting] == [False, True, True, True]
    finally:
        close()


@contextmanager
def serving_a_large_answer(stall_seconds: float) -> Iterator[int]:
    """A port where every request is answered with 40 MiB."""

    async def large(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for remaining in reversed(range(40)):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": remaining > 0})

    listener = server.listen("127.0.0.1", 0, ServerLimits(stall_seconds=stall_seconds))
    close = server.serve(large, listener, "large")
    try:
        yield listener.getsockname()[1]
    finally:
        close()


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def test_a_client_that_takes_nothing_is_cut_off():
    with serving_a_large_answer(stall_seconds=1.0) as port, connect(port, GET) as deaf:
        time.sleep(4.0)
        with pytest.raises(ConnectionError):
            while deaf.recv(1 << 20):
                pass


@pytest.mark.long
def test_a_client_that_takes_its_answer_slowly_is_not_cut_off():
    """Though the whole takes longer than it may stand still."""
    with serving_a_large_answer(stall_seconds=12.0) as port, connect(port, GET) as slow:
        received_bytes, start = 0, time.monotonic()
        while piece := slow.recv(1 << 20):
            received_bytes += len(piece)
            if time.monotonic() - start < 18.0:
                time.sleep(0.5)
        assert received_bytes > 40 << 20


def test_loopback_answers_to_its_own_names(start: Start):
    """With any port: an ssh tunnel may have another one at its other end."""
    port = start()
    for host in ("localhost", "LOCALHOST:8710", "127.0.0.1", "127.0.0.2:1", "[::1]:8710", "a.localhost."):
        assert ask(port, Host=host).status_code == 200


def test_another_name_is_refused_unless_it_is_allowed(start: Start):
    """A page whose name leads to 127.0.0.1 reads nothing; a proxy's name is named in the run file."""
    port, allowing = start(), start(("sluice.example.org",))
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""):
        answer = ask(port, "/metrics", Host=host)
        assert answer.status_code == 421 and "monitor.allowed_hosts" in answer.json()["error"]
        assert ask(allowing, Host=host).status_code == 421
    assert ask(allowing, Host="Sluice.example.org:443").status_code == 200


def test_a_program_that_names_no_host_is_served(start: Start):
    """HTTP/1.0 knows no Host; no browser speaks it."""
    with connect(start(), b"GET /healthz HTTP/1.0\r\n\r\n") as plain:
        assert plain.recv(100).startswith(b"HTTP/1.1 200")


def test_where_other_machines_reach_it_any_name_will_do(run_directory: Path):
    """Who reaches it reads it anyhow, or needs the token: Prometheus may use whatever name it knows."""
    port, close = start_metrics_server(new_registry(), "0.0.0.0", 0)
    try:
        assert ask(port, Host="gpu7.cluster").status_code == 200
    finally:
        close()
    app = make_app(run_directory, new_registry(), token=TOKEN)
    port, close = start_service(app, "127.0.0.1", 0, lambda: False, None)
    try:
        assert ask(port, "/v1/run", Host="evil.example").status_code == 401
        assert ask(port, "/v1/run", Host="proxy", Authorization=f"Bearer {TOKEN}").status_code == 200
    finally:
        close()


def test_allowed_hosts_are_names(tmp_path: Path):
    """No scheme, no port: told at start."""
    (tmp_path / "run.toml").write_text('[monitor]\nallowed_hosts = ["https://sluice.example.org:8710"]\n')
    with pytest.raises(SettingsError, match=r'monitor\.allowed_hosts\.0 = "https://sluice.*without scheme and port'):
        read_run_file(TrainerSettings, str(tmp_path / "run.toml"), [])


def test_no_answer_lets_a_browser_guess_its_type(run_directory: Path):
    """Every route, found or not, page or file, and those that are refused."""
    app = make_app(run_directory, new_registry())
    values = {"name": "000000001000", "path:path": "small/cfg.json", "sae": "small", "index:int": "0"}
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    assert len(paths) > 15
    port, close = start_service(app, "127.0.0.1", 0, lambda: False)
    metrics_port, close_metrics = start_metrics_server(new_registry(), "127.0.0.1", 0)
    try:
        for path in [*paths, "/static/live_page.js", "/nothing"]:
            for name, value in values.items():
                path = path.replace("{" + name + "}", value)
            assert ask(port, path).headers["x-content-type-options"] == "nosniff", path
        assert ask(port, Host="evil.example").headers["x-content-type-options"] == "nosniff"
        for path in ("/metrics", "/healthz", "/readyz", "/nothing"):
            assert ask(metrics_port, path).headers["x-content-type-options"] == "nosniff", path
    finally:
        close()
        close_metrics()


def test_nonsense_is_answered_once_and_not_logged(
    run_directory: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    """Whether it comes at once or while an answer is under way: nobody fills the log by sending it."""
    port, close = start_service(make_app(run_directory, new_registry()), "127.0.0.1", 0, lambda: False)
    wait = b"GET /v1/snapshots/latest?after=000000001000&wait=1 HTTP/1.1\r\nHost: localhost\r\n"
    try:
        with connect(port, b"nonsense\r\n\r\n") as plain:
            answer = plain.recv(1000)
            assert answer.startswith(b"HTTP/1.1 400") and b"nosniff" in answer
        with connect(port, wait + b"Upgrade: websocket\r\nConnection: upgrade, close\r\n\r\n") as plain:
            assert plain.recv(1000).startswith(b"HTTP/1.1 204")
        with connect(port, wait + b"Transfer-Encoding: chunked\r\n\r\n") as plain:
            time.sleep(0.2)
            plain.sendall(b"nonsense\r\n")
            wait_until(lambda: not is_open(plain))
        time.sleep(1)  # until the answer that nobody takes would have been sent
        assert ask(port).status_code == 200
    finally:
        close()
    assert not caplog.records and "Traceback" not in capfd.readouterr().err


def test_a_small_limit_of_open_files_is_respected(monkeypatch: pytest.MonkeyPatch):
    """Connections leave three quarters of them for the work."""
    for soft, expected in ((64, 16), (1024, 256), (1 << 20, 256), (server.resource.RLIM_INFINITY, 256)):
        monkeypatch.setattr(server.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert server.most_connections(DEFAULT_LIMITS) == expected
