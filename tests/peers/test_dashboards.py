"""Exported latents, read by SAEDashboard and by Neuronpedia's package. Run by `make peers`.

SAEDashboard wants older transformers than SAELens' newest, so that the two have an environment of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from monitor.cli.export import main
from tests.small_reading import DENSE, WORDS, read_run, small_model

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("dashboards.py")


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get("SLUICE_DASHBOARDS_PYTHON")
    if path is None:
        pytest.skip("SLUICE_DASHBOARDS_PYTHON names no environment; run `make peers`")
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the SAE in each format."""
    folder = tmp_path_factory.mktemp("latents")
    read_run(folder, small_model())
    shutil.copyfile(folder / "run.toml", folder / "run/settings.toml")
    for name in ("neuronpedia", "saedashboard"):
        assert main([str(folder / "run"), "--to", str(folder / name), "--format", name]) == 0
    return {name: folder / name / "planted" for name in ("neuronpedia", "saedashboard")}


def ask(python: str, *arguments: str) -> str:
    environment = os.environ | {"NEURONPEDIA_API_KEY": "key", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([python, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.splitlines()[-1] if process.stdout else ""


def test_saedashboard_draws_them(python: str, exported: dict[str, Path], tmp_path: Path) -> None:
    """Its own page: every latent, its title, its words."""
    page = tmp_path / "page.html"
    facts = json.loads(ask(python, "draw", str(exported["saedashboard"]), str(ROOT / "producer/demo_lm"), str(page)))

    assert facts["latents"] == list(range(DENSE + 1))
    assert facts["max"][0] == pytest.approx(10.0, rel=1e-3)
    text = page.read_text()
    assert "TOP ACTIVATIONS" in text and "DENSITY = " in text and "import" in text


def test_saedashboard_reads_the_batches_it_makes_for_neuronpedia(python: str, exported: dict[str, Path]) -> None:
    """And writes them again as they are."""
    assert json.loads(ask(python, "batch", str(exported["saedashboard"])))["latents"] == list(range(DENSE + 1))


@pytest.fixture
def api() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """(address, requests) of what takes uploads."""
    requests: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, json.loads(body)))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api", requests
    server.shutdown()
    thread.join()


def test_neuronpedia_sends_what_we_write(
    python: str, exported: dict[str, Path], api: tuple[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    """Its package, given our latents as its own classes, posts our document."""
    url, requests = api
    ask(python, "upload", str(exported["neuronpedia"]), url)

    document = json.loads((exported["neuronpedia"] / "batch-0.json").read_text())
    assert requests == [("/api/feature/upload-batch", document)]
    assert document["features"][0]["topLogits"][0]["token"] == WORDS[0]
