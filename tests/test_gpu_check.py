"""`make gpu-check`: parts that are bounded, skipped by name or failed, and results that are written as they come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu_check import NO_GPU, PARTS, Part, check

ROOT = Path(__file__).parent.parent
MAX_SECONDS = 480


def test_parts_take_eight_minutes_at_most() -> None:
    """Each is bounded, and their names are their own."""
    assert sum(part.seconds for part in PARTS) <= MAX_SECONDS
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_no_gpu_is_told_with_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """Neither success nor a failed check."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check", "--to", str(tmp_path / "results")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (NO_GPU, "")
    assert "torch sees no CUDA GPU here, so nothing was checked" in process.stdout


def test_each_part_has_its_result(tmp_path: Path) -> None:
    """One that fails, takes too long or lacks a package lets the others go on."""
    parts = (
        Part("good", ("-c", "print('{device}')"), 100, ("json",)),
        Part("bad", ("-c", "raise SystemExit(5)"), 100, ()),
        Part("slow", ("-c", "import time; time.sleep(600)"), 1, ()),
        Part("absent", ("-c", ""), 100, ("json", "no_such_package")),
        Part("gpu", ("-c", ""), 100, (), True),
    )
    file = tmp_path / "results.jsonl"
    assert check(parts, "cpu", file) == 1
    results = {
        line["part"]: (line["result"], line["reason"]) for line in map(json.loads, file.read_text().splitlines())
    }
    assert results == {
        "good": ("passed", ""),
        "bad": ("failed", "exit code 5"),
        "slow": ("timed out", "longer than 1 s"),
        "absent": ("skipped", "not installed: no_such_package"),
        "gpu": ("skipped", "needs a GPU"),
    }
    assert json.loads(file.read_text().splitlines()[0])["output"] == ["cpu"]
