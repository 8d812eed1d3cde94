"""The wheel, in an environment of its own and an empty folder: the demo runs, and nothing needs the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "run.tokens=20000",
    "buffer.rows=16384",
    "optimizer.batch=1024",
    "optimizer.warmup_tokens=5000",
    "sae.topk.d_sae=256",
    "sae.jumprelu.d_sae=256",
    "snapshots.every_tokens=15000",
    "monitor.trainer_port=0",
    "monitor.producer_port=0",
    "monitor.port=0",
    "monitor.service_port=0",
    "monitor.evaluation_tokens=2048",
    "monitor.latents_tokens=0",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    process = subprocess.run(build, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = folder.glob("sluice_sae-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel, and this one's libraries without its checkout of Sluice."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # A path file's own path files are not followed, so that the checkout, which is installed by one, is not found.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command = [*install, "--ignore-installed", str(wheel)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder / "bin"


def run(program: Path, *arguments: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(program), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def test_it_holds_run_files_and_deployment_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"producer", "trainer", "monitor", "deploy"}
    for name in ("demo.toml", "gpt2.toml", "demo.py", "systemd/sluice.target", "slurm/sluice.sbatch"):
        assert f"deploy/{name}" in names
    assert "producer/demo_lm/model.safetensors" in names
    assert "monitor/grafana/dashboards/training.json" in names
    assert not [name for name in names if name.startswith("deploy/secrets/")]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """`model.name = "demo"` is found, and the last command that is shown names the installed script."""
    overrides = [*SMALL, f"stream.endpoint=ipc://{tmp_path}/stream"]
    process = run(installed / "sluice-demo", *overrides, cwd=tmp_path, timeout=500)
    assert process.returncode == 0, process.stdout + process.stderr
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert set(summary["saes"]) == {"topk", "jumprelu"}
    assert process.stdout.rstrip().splitlines()[-1].strip().startswith(f"{installed}/sluice-monitor ")
    config = json.loads(next((tmp_path / "runs/demo/snapshots").glob("*/topk/cfg.json")).read_text())
    assert config["metadata"]["model_name"] == "demo"


def test_files_to_start_from(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "sluice-demo", "--files", "deploy", cwd=tmp_path).returncode == 0
    assert (tmp_path / "deploy/gpt2.toml").read_text() == (ROOT / "deploy/gpt2.toml").read_text()
    assert not list((tmp_path / "deploy").rglob("*.py"))
    assert run(installed / "sluice-trainer", "deploy/demo.toml", "--print-settings", cwd=tmp_path).returncode == 0
    again = run(installed / "sluice-demo", "--files", "deploy", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (2, "deploy exists; name a new folder\n")


def test_a_package_that_was_installed_over_it_is_told(installed: Path, tmp_path: Path) -> None:
    """`pip install` of another distribution with a package `trainer` replaces files of Sluice's."""
    path = next((installed.parent / "lib").glob("python*/site-packages")) / "trainer" / "__init__.py"
    own = path.read_text()
    path.write_text("from trainer.elsewhere import Trainer\n")
    try:
        for script in ("sluice-trainer", "sluice-producer", "sluice-demo"):
            process = run(installed / script, "--help", cwd=tmp_path)
            assert process.returncode == 2
            assert process.stderr.startswith(f'the package "trainer" at {path} is not Sluice\'s')
            assert len(process.stderr.splitlines()) == 1
    finally:
        path.write_text(own)
    assert run(installed / "sluice-trainer", "--help", cwd=tmp_path).returncode == 0
