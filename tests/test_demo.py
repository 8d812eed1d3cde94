"""`make demo` in small: the same program, processes, language model and text, fewer tokens and latents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.snapshot import snapshot_names, verify

ROOT = Path(__file__).parent.parent
HELD_OUT_FVU = {"topk": 0.313, "jumprelu": 0.528}
"""After 40,000 tokens and with 512 latents; the whole demo ends at 0.041 and 0.040."""


def small(tmp_path: Path, tokens: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "deploy.demo",
        f"run.directory={tmp_path}/run",
        f"run.tokens={tokens}",
        f"stream.endpoint=ipc://{tmp_path}/stream",
        "buffer.rows=16384",
        "optimizer.batch=1024",
        "optimizer.warmup_tokens=5000",
        "sae.topk.d_sae=512",
        "sae.jumprelu.d_sae=512",
        "snapshots.every_tokens=15000",
        "monitor.trainer_port=0",
        "monitor.producer_port=0",
        "monitor.port=0",
        "monitor.service_port=0",
        "monitor.evaluation_tokens=2048",
    ]


def processes_of(directory: Path) -> list[psutil.Process]:
    """Every process on this machine that works on the run in `directory`."""
    processes = []
    for process in psutil.process_iter():
        try:
            if any(f"{directory}/run" in argument for argument in process.cmdline()):
                processes.append(process)
        except psutil.Error:
            continue  # it ended while we looked
    return processes


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    """Exit 0, a table of both SAEs with figures from held-out text, valid snapshots, and nothing left running."""
    process = subprocess.run(small(tmp_path, 40_000), cwd=ROOT, capture_output=True, text=True)

    assert process.returncode == 0, process.stdout + process.stderr
    assert "Results" in process.stdout
    assert "SAE.load_from_disk(" in process.stdout
    last = process.stdout.rstrip().splitlines()[-1]
    assert _serves(last), f"the last command that the demo shows does not work: {last}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"topk", "jumprelu"} == set(summary["saes"])
    for name, sae in summary["saes"].items():
        assert sae["ce_sae"] > sae["ce_clean"] > 0
        assert sae["held_out_fvu"] == pytest.approx(HELD_OUT_FVU[name], rel=0.2), name
    names = snapshot_names(tmp_path / "run")
    assert len(names) >= 3
    for name in names:
        verify(tmp_path / "run" / "snapshots" / name)
    assert processes_of(tmp_path) == []


def _serves(line: str) -> bool:
    """Whether a command, as it is shown, starts a monitor in a shell where no virtual environment is active."""
    environment = os.environ | {"PATH": "/usr/bin:/bin"}
    shell = ["sh", "-c", f"exec {line.strip()}"]
    with subprocess.Popen(shell, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as monitor:
        assert monitor.stderr is not None
        log_line = monitor.stderr.readline()
        monitor.terminate()
    return "http://127.0.0.1:" in log_line


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["at once", pytest.param("in mid-run", marks=pytest.mark.long)])
def test_ctrl_c_stops_everything(tmp_path: Path, moment: str) -> None:
    """The interrupt key at any moment: all processes are gone, and the terminal says so."""
    demo = subprocess.Popen(
        small(tmp_path, 100_000_000), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 240
    history = tmp_path / "run" / "metrics.jsonl"
    while len(processes_of(tmp_path)) < 4 or (
        moment == "in mid-run" and not (history.exists() and history.read_text())
    ):
        assert time.monotonic() < deadline
        assert demo.poll() is None
        time.sleep(0.1)
    os.killpg(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=120)

    assert demo.returncode == 130
    assert "nothing is left running" in output.decode()
    assert "Traceback" not in output.decode()
    assert processes_of(tmp_path) == []
