"""The commands of compose.yaml and of the units, run on this machine: paths and hosts are replaced, nothing else."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
import zmq

from producer.keys import connect_encrypted, serve_encrypted
from tests.deploy.synthetic_run import RUN_FILE, free_ports

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}

pytestmark = pytest.mark.skipif(not (BIN / "sluice-demo").is_file(), reason="not installed: pip install -e .")


class Service:
    """A service of compose.yaml: its secrets where it expects them, its command, its log."""

    def __init__(self, name: str, folder: Path, stream_port: int, ports: list[str]) -> None:
        service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
        secrets = service["secrets"]
        service = service["services"][name]
        own = folder / name
        for use in service["secrets"]:
            target = own / use["target"].removeprefix("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder / secrets[use["source"]]["file"])
        replacements = {
            "/etc/sluice/run.toml": f"{folder}/run.toml",
            "/runs/": f"{folder}/runs/",
            "/run/secrets/": f"{own}/run/secrets/",
            "trainer:5710": f"127.0.0.1:{stream_port}",
            "0.0.0.0:5710": f"0.0.0.0:{stream_port}",
        }
        words = list(service["command"])
        for old, new in replacements.items():
            words = [word.replace(old, new) if not word.startswith(str(own)) else word for word in words]
        self.log = folder / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [BIN / words[0], *words[1:], *ports], cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log
            )

    def wait_for(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        """The first match of `pattern` in the log."""
        deadline = time.monotonic() + seconds
        while True:
            if (match := re.search(pattern, self.log.read_text())) is not None:
                return match
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(180)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Secrets as secrets.sh writes them, and a run file."""
    command = ["sh", DEPLOY / "secrets.sh", tmp_path / "secrets"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=60)
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "runs").mkdir()
    yield tmp_path


def answer(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.long
@pytest.mark.timeout(500)
def test_the_services_of_compose_find_each_other(folder: Path) -> None:
    """Over an encrypted stream, with only their own secrets; the page asks for the token, and all stop cleanly."""
    (port,) = free_ports(1)
    with ExitStack() as stack:
        trainer = Service("trainer", folder, port, ["monitor.trainer_port=0"])
        stack.callback(trainer.process.kill)
        producer = Service("producer", folder, port, ["monitor.producer_port=0"])
        stack.callback(producer.process.kill)
        monitor = Service("monitor", folder, port, ["monitor.port=0", "monitor.service_port=0"])
        stack.callback(monitor.process.kill)

        trainer.wait_for(r"joins \(1 at work\)")
        metrics = trainer.wait_for(r"metrics at http://0\.0\.0\.0:(\d+)/metrics")[1]
        page = monitor.wait_for(r" at http://0\.0\.0\.0:(\d+)/")[1]
        host = socket.gethostname()
        assert answer(f"http://127.0.0.1:{metrics}/healthz") == 200
        assert answer(f"http://{host}:{metrics}/metrics") == 200
        assert answer(f"http://127.0.0.1:{page}/") == 401
        assert answer(f"http://{host}:{page}/", (folder / "secrets/token").read_text()) == 200

        assert [service.stop() for service in (monitor, producer, trainer)] == [0, 0, 0]
    assert list((folder / "runs/run/checkpoint").iterdir())


def test_units_give_keys_as_the_stream_expects_them(folder: Path) -> None:
    """What the drop-ins run and load, with systemd's folders replaced: the two sides accept it."""
    texts = {
        role: (DEPLOY / f"systemd/sluice-{role}@.service.d/keys.conf").read_text() for role in ("trainer", "producer")
    }
    keys = {}
    for role, text in texts.items():
        credentials, runtime = folder / f"{role}-credentials", folder / f"{role}-runtime"
        credentials.mkdir()
        runtime.mkdir()
        for name, source in re.findall(r"LoadCredential=([\w.]+):/etc/sluice/(.+)", text):
            (credentials / name).write_bytes((folder / "secrets" / source).read_bytes())
        (value,) = re.findall("Environment=SLUICE_KEYS=(.+)", text)
        keys[role] = {"%t/sluice-trainer/%i": str(runtime), "%d": str(credentials)}[value]
        environment = ENVIRONMENT | {"CREDENTIALS_DIRECTORY": str(credentials), "SLUICE_KEYS": keys[role]}
        for command in re.findall("ExecStartPre=(.+)", text):
            command = command.replace("/etc/sluice", f"{folder}/secrets")
            subprocess.run(["sh", "-c", command], env=environment, check=True, timeout=60)
    context = zmq.Context()
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    authenticator, _ = serve_encrypted(context, server, keys["trainer"])
    try:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        connect_encrypted(client, keys["producer"])
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"hello")
        assert server.poll(20_000) and server.recv_multipart()[1] == b"hello"
    finally:
        authenticator.stop()
        context.destroy(linger=0)
