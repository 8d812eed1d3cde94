"""`make gpu-check PYTHON=python3`: what an image with torch and a GPU can show of Sluice within eight minutes.

    python3 -m tests.benchmarks.gpu_check [--to FILE] [--device cpu]

Installs nothing and needs no network. Each part runs in a process of its own, for a bounded time; a part whose packages
are absent is skipped by name, and one that fails or takes too long lets the others go on. Results are written as they
come, one JSON object a line, with the last lines of what each part printed. On a CPU the parts that need a GPU are
skipped, so that the rest can be tried.

Exit codes: 0 all parts passed or were skipped, 1 one failed, 3 no GPU is at hand and `--device cpu` was not asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NO_GPU = 3
LAST_LINES = 40
PYTEST = (
    *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib"),
    *("-c", os.devnull, "--rootdir", str(ROOT)),  # our own settings ask for plugins that an image may lack
)
TESTING = ("torch", "pytest")
RUNNING = ("pydantic", "zmq", "msgpack", "safetensors", "numba", "transformers", "prometheus_client")


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    arguments: tuple[str, ...]
    """Of Python; `{device}` stands for the device."""
    seconds: int
    packages: tuple[str, ...]
    needs_gpu: bool = False


PARTS = (
    Part("machine", ("-m", "tests.benchmarks.gpu_check", "--machine", "{device}"), 40, ("torch",)),
    Part("kernel module", ("-m", "tests.benchmarks.gpu_check", "--module", "{device}"), 30, ("torch", "numba")),
    Part("kernels", (*PYTEST, "tests/test_cuda_kernels.py"), 100, (*TESTING, "triton", "numba"), True),
    Part("training", (*PYTEST, "-m", "gpu", "tests/test_gpu.py"), 120, (*TESTING, *RUNNING, "triton", "httpx"), True),
    Part(
        "step",
        ("-m", "tests.benchmarks", "--only", "step-topk", "--rounds", "1", "--quick", "--device", "{device}"),
        90,
        ("torch", "rich", *RUNNING),
    ),
    Part("two ranks", ("-m", "tests.benchmarks.gpu_ranks", "ranks", "{device}"), 45, ("torch", *RUNNING)),
    Part("share of 2^24", ("-m", "tests.benchmarks.gpu_ranks", "share", "{device}"), 30, ("torch", *RUNNING)),
    Part("auxk", ("-m", "tests.benchmarks.gpu_ranks", "auxk", "{device}"), 25, ("torch", *RUNNING)),
)
"""In the order of what a first minute should tell; together at most eight minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("gpu-check.jsonl"), help="file of results (gpu-check.jsonl)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries what needs no GPU")
    parser.add_argument("--machine", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument("--module", metavar="DEVICE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.machine:
        return _measure_machine(options.machine)
    if options.module:
        return _check_module(options.module)
    if options.device == "cuda" and (reason := _no_gpu()):
        print(f"gpu-check: {reason}, so nothing was checked; `--device cpu` tries the parts that need none")
        return NO_GPU
    return check(PARTS, options.device, options.to)


def check(parts: Sequence[Part], device: str, to: Path) -> int:
    """Runs all parts, and writes and prints their results; returns the exit code."""
    results = []
    with to.open("w") as file:
        for part in parts:
            result = _run(part, device)
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(
                f"{result['part']:14} {result['result']:9} {result['seconds']:6.1f} s  {result['reason']}", flush=True
            )
    print(f"written to {to}")
    return int(any(result["result"] in ("failed", "timed out") for result in results))


def _no_gpu() -> str | None:
    """Why there is no GPU; None where there is one."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA GPU here"


def _run(part: Part, device: str) -> dict[str, Any]:
    """The result of one part: passed, failed, timed out or skipped, with its reason and last lines."""
    result: dict[str, Any] = {"part": part.name, "result": "skipped", "seconds": 0.0, "reason": "", "output": []}
    if part.needs_gpu and device == "cpu":
        return result | {"reason": "needs a GPU"}
    if missing := [name for name in part.packages if importlib.util.find_spec(name) is None]:
        return result | {"reason": f"not installed: {', '.join(missing)}"}
    command = [sys.executable, *(word.format(device=device) for word in part.arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=part.seconds)
        result["result"] = "failed" if process.returncode else "passed"
        result["reason"] = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # of its own session: also what it started
        output, _ = process.communicate()
        result |= {"result": "timed out", "reason": f"longer than {part.seconds} s"}
    return result | {"seconds": round(time.monotonic() - began, 1), "output": output.splitlines()[-LAST_LINES:]}


def _measure_machine(device: str) -> int:
    """Prints versions, and the rates that bounds of steps are worked out from."""
    import torch

    size, rows = (8192, 1 << 20) if device == "cuda" else (512, 1 << 14)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    table, chosen = torch.randn(4096, 2304, device=device), torch.randint(4096, (rows // 64,), device=device)
    block, to = torch.empty(rows * 256, device=device), torch.empty(rows * 256, device=device)
    seconds = {
        "copy": _seconds(lambda: to.copy_(block), device),
        "product": _seconds(lambda: a @ a, device),
        "gather": _seconds(lambda: table[chosen], device),
    }
    facts = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "copy_bytes_per_second": 2 * 4 * block.numel() / seconds["copy"],
        "bfloat16_flops": 2 * size**3 / seconds["product"],
        "gather_bytes_per_second": 4 * 2304 * len(chosen) / seconds["gather"],
    }
    print(json.dumps(facts))
    return 0


def _seconds(function: Any, device: str, times: int = 5) -> float:
    """The shortest of some runs."""
    import torch

    shortest = float("inf")
    for _ in range(times + 1):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def _check_module(device: str) -> int:
    """Fails where another kernel module would run than the one of this device, which nothing else tells."""
    import torch

    from trainer.kernels import sparse

    module = sparse.kernels(torch.device(device)).__name__
    print(module)
    return int(not module.endswith(f".{device}"))


if __name__ == "__main__":
    sys.exit(main())
