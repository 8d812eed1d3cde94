"""What `python -m trainer estimate` predicts, beside what is measured: step times over a grid of sizes, and memory.

The machine's two numbers are always measured at one size, and just before each step: what else a machine does changes
within a minute. They predict every point.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

import torch

from tests.benchmarks.measure import Figure, Options, Result
from tests.benchmarks.step import TITLES, stepping
from tests.benchmarks.subject import Size, correlated_rows, sae_trainer, size_for
from trainer.planning import cost
from trainer.planning.cost import Machine, StepCost
from trainer.planning.machine import measure_machine
from trainer.planning.workload import step_costs
from trainer.settings import TrainerSettings

WIDEST, NARROWEST = 1.25, 0.75
"""Goals: the largest and the smallest of predicted / measured."""
COMBINATIONS = [(32, 4096), (16, 1024), (64, 4096), (32, 1024), (16, 4096), (64, 1024)]
"""k and batch; a point of the grid takes the next."""


def run(options: Options) -> Iterator[Result]:
    yield _steps(options)
    yield _memory(options)


def grid(device: str, quick: bool) -> list[tuple[str, Size]]:
    """Every d_sae with every d_in for TopK, each k and batch at several of them; two sizes for the others."""
    sizes = [(d_sae, d_in) for d_sae in (2**12, 2**13, 2**14, 2**15) for d_in in (256, 768, 1024)]
    if device != "cpu":
        sizes = [(d_sae, d_in) for d_sae in (2**14, 2**16, 2**17) for d_in in (768, 2304, 4096)]
    sizes = sizes[:2] if quick else sizes
    points = [
        ("topk", Size(d_in, d_sae, *COMBINATIONS[number % len(COMBINATIONS)]))
        for number, (d_sae, d_in) in enumerate(sizes)
    ]
    others = [(sizes[1], 0), (sizes[-2], 3)]
    return points + [
        (architecture, Size(d_in, d_sae, *COMBINATIONS[combination]))
        for architecture in ("batchtopk", "jumprelu")
        for (d_sae, d_in), combination in others[: 1 if quick else 2]
    ]


def _steps(options: Options) -> Result:
    largest = size_for(options.device, options.quick)
    reference = work_of("topk", largest)
    machines: list[Machine] = []

    def measure() -> float:
        machines.append(measure_machine(reference, options.device, torch.get_num_threads(), "bfloat16"))
        return machines[-1].matmul_flops / 1e12

    result = Result("Step time, predicted from two numbers of the machine, and measured", "ms")
    ratios = []
    for architecture, size in grid(options.device, options.quick):
        label = f"{TITLES[architecture]}, {size}"
        rows = correlated_rows(max(2 * size.batch, 4096), size.d_in)
        subject = sae_trainer(architecture, size, options.device, rows)
        step = stepping(subject, rows.to(options.device), size.batch)
        point = Result(result.title, result.unit)
        point.take_turns(options.rounds, {"machine": measure, "step": step})
        result.notes += point.notes
        if "step" not in point.measured:
            continue
        predicted = [
            1e3 * cost.step_seconds(work_of(architecture, size), machine) for machine in machines[-options.rounds :]
        ]
        result.measured[f"{label}: predicted"] = predicted
        result.measured[f"{label}: measured"] = point.measured["step"]
        ratios.append(median(a / b for a, b in zip(predicted, point.measured["step"], strict=True)))
        result.figures.append(Figure("predicted / measured", ratios[-1]))
    result.figures += [
        Figure("predicted / measured step, the largest", max(ratios, default=None), WIDEST),
        Figure("predicted / measured step, the smallest", min(ratios, default=None), NARROWEST, at_least=True),
    ]
    result.notes.append(
        f"encoder product {median(machine.matmul_flops for machine in machines) / 1e12:.2f} TFLOP/s, "
        f"copy {median(machine.bandwidth for machine in machines) / 1e9:.1f} GB/s"
    )
    return result


def work_of(architecture: str, size: Size) -> StepCost:
    """What `subject.sae_trainer` makes of a size, as an estimate sees it."""
    sparsity = {"target_l0": float(size.k)} if architecture == "jumprelu" else {"k": size.k}
    sae = {"name": architecture, "architecture": architecture, "d_sae": size.d_sae, **sparsity}
    settings = TrainerSettings.model_validate(
        {"model": {"name": "m", "hooks": ["h"]}, "optimizer": {"batch": size.batch}, "sae": [sae]}
    )
    return step_costs(settings, size.d_in, cost.HALF)[0]


def _memory(options: Options) -> Result:
    """The memory section's own process measures what a step holds at its highest moment."""
    size, kernels = size_for(options.device, options.quick), cost.CPU if options.device == "cpu" else cost.CUDA
    result = Result(f"Memory of an SAE that learns, predicted and measured: {size}", "MB")
    for architecture in TITLES:
        label, parts = TITLES[architecture], cost.memory_parts(work_of(architecture, size), kernels)
        result.take_turns(
            options.rounds,
            {
                f"{label}: predicted": lambda parts=parts: sum(parts.values()) / 1e6,
                f"{label}: measured": lambda name=architecture: _held(name, size, options),
            },
        )
        ratio = result.ratio(f"{label}: predicted", f"{label}: measured")
        result.figures += [
            Figure(f"{label} memory, predicted / measured", ratio, WIDEST),
            Figure(f"{label} memory, predicted / measured", ratio, NARROWEST, at_least=True),
        ]
    return result


def _held(architecture: str, size: Size, options: Options) -> float:
    """Megabytes: what tests.benchmarks.memory finds beyond parameters, moments and all pre-activations, and these."""
    words = [architecture] + ["quick"] * options.quick + ["cuda"] * (options.device != "cpu")
    command = [sys.executable, "-m", "tests.benchmarks.memory", *words]
    beyond = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["megabytes"]
    return beyond + (3 * 4 * size.parameters + 2 * size.batch * size.d_sae) / 1e6
