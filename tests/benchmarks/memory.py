"""What a step needs beyond parameters, optimizer and pre-activations, at its highest moment, in a process of its own.

python -m tests.benchmarks.memory ARCHITECTURE [quick] [cuda]     one measurement, as JSON
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.subject import HOOK, QUICK_SIZE, Size, correlated_rows, sae_trainer, size_for

STEPS = 4


def run(options: Options) -> Iterator[Result]:
    size = size_for(options.device, options.quick)
    result = Result(f"Memory of a step beyond what it must hold: {size}", "MB")
    names = {"TopK": "topk", "BatchTopK": "batchtopk", "JumpReLU": "jumprelu"}
    result.take_turns(options.rounds, {name: partial(_in_own_process, names[name], options) for name in names})
    known_mb = _known_bytes(size) / 1e6
    result.notes.append(f"parameters, two moments and bfloat16 pre-activations: {known_mb:,.0f} MB")
    result.figures = [
        Figure(f"{name}, beyond / what it must hold", result.middle(name) / known_mb, 0.25)
        for name in names
        if name in result.measured
    ]
    yield result


def _known_bytes(size: Size) -> int:
    return 3 * 4 * size.parameters + 2 * size.batch * size.d_sae


def _in_own_process(architecture: str, options: Options) -> float:
    words = [architecture] + ["quick"] * options.quick + ["cuda"] * (options.device != "cpu")
    command = [sys.executable, "-m", "tests.benchmarks.memory", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["megabytes"]


def _measure(architecture: str, size: Size, device: str) -> float:
    """Megabytes beyond the known ones at the highest moment of the steps after the first."""
    rows = correlated_rows(2 * size.batch, size.d_in).to(device)
    _steps(architecture, QUICK_SIZE, device, correlated_rows(2 * QUICK_SIZE.batch, QUICK_SIZE.d_in).to(device))
    before = _held(device)
    return (_steps(architecture, size, device, rows) - before - _known_bytes(size)) / 1e6


def _steps(architecture: str, size: Size, device: str, rows: torch.Tensor) -> int:
    """The most bytes this process held while steps were taken."""
    subject = sae_trainer(architecture, size, device, rows)
    batches = rows.split(size.batch)
    subject.step({HOOK: batches[0]})
    _forget_highest(device)
    for step in range(STEPS):
        subject.step({HOOK: batches[step % len(batches)]})
    return _highest(device)


def _held(device: str) -> int:
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    _give_back()
    return _of_status("VmRSS")


def _forget_highest(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")


def _highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else _of_status("VmHWM")


def _of_status(name: str) -> int:
    """A line of the kernel's own account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _give_back() -> None:
    """Memory that was freed and kept for later use would be counted as used."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    _device = "cuda" if "cuda" in sys.argv else "cpu"
    print(json.dumps({"megabytes": _measure(sys.argv[1], size_for(_device, "quick" in sys.argv), _device)}))
