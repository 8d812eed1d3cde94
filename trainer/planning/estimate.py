"""`python -m trainer estimate RUN.toml`: speed, memory and duration of a run, and what bounds them, before it starts.

The two numbers of a machine that it needs are measured here, or come from a data sheet (`--machine`) or from the
arguments (`--matmul-tflops`, `--bandwidth-gbs`). Exit codes: 0 estimated, 2 the arguments do not say enough.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser, positive_count, positive_number
from producer.common.completion import complete
from producer.common.run_file import read_run_file
from producer.common.toml import SettingsError, show_value
from trainer.planning.cost import CPU, CUDA, FLOAT32, HALF, MACHINES, Machine, StepCost
from trainer.planning.prediction import Estimate, groups_of
from trainer.planning.sharding import MAX_GPUS, ShardedStep, fewest_gpus, grouped_step
from trainer.planning.workload import (
    EstimateError,
    LanguageModelSize,
    language_model_size,
    step_costs,
    training_threads,
)
from trainer.settings import TrainerSettings

PURPOSE = """Predicts the speed, the memory and the duration of a run from two numbers of a machine: the rate of its
encoder product and the bandwidth of its memory. Without options they are measured here, in about two seconds.

Several GPUs: `--gpus N`, or `--days D` for the fewest, as ranks under torchrun that share the latents of each SAE. The
commands that start the run are printed too. Nobody has measured it: NCCL over several GPUs is untested."""


def main(arguments: list[str]) -> int:
    parser = _parser()
    complete(parser, arguments)
    options = parser.parse_intermixed_args(arguments)
    try:
        estimate = _estimate(read_run_file(TrainerSettings, options.run_file, options.overrides), options)
    except (SettingsError, EstimateError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(estimate.as_json(), indent=1))
    else:
        from trainer.planning.tables import show  # imports rich, which `--help` and `--json` do not wait for

        show(estimate)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "trainer",
        "estimate",
        PURPOSE,
        (
            "deploy/gpt2.toml",
            "deploy/gpt2.toml --machine h100 --days 2",
            "deploy/gpt2.toml sae.topk.d_sae=131072 --json",
        ),
    )
    parser.add_argument(
        "run_file", type=path_argument, metavar="RUN.toml", help="the run's settings; deploy/ holds examples"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces one setting of the file")
    parser.add_argument("--machine", metavar="NAME", help=f"data sheet instead of measuring: {', '.join(MACHINES)}")
    parser.add_argument(
        "--matmul-tflops", type=positive_number, metavar="X", help="rate of the encoder product, 10¹² FLOP/s"
    )
    parser.add_argument("--bandwidth-gbs", type=positive_number, metavar="Y", help="bandwidth of a copy, 10⁹ bytes/s")
    parser.add_argument("--gpus", type=int, metavar="N", help="latents sharded over so many GPUs (under torchrun)")
    parser.add_argument(
        "--days", type=positive_number, metavar="D", help="the fewest GPUs that end run.tokens in so long"
    )
    parser.add_argument(
        "--width",
        type=positive_count,
        metavar="D",
        help="of the activations of each hook, when the model is not on this disk",
    )
    parser.add_argument(
        "--model-parameters",
        type=positive_number,
        metavar="P",
        help="weights of the model's blocks up to the last hook",
    )
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    return parser


def _estimate(settings: TrainerSettings, options: argparse.Namespace) -> Estimate:
    """Raises EstimateError when something is missing."""
    if options.gpus is not None and options.gpus < 1:
        raise EstimateError(f"--gpus {options.gpus}: one at least")
    model = language_model_size(settings, options.width, options.model_parameters)
    machine = _machine(settings, options, model.width)
    saes = step_costs(settings, model.width, machine.number_bytes)
    sharded = _sharded(settings, options, model, machine, saes)
    return Estimate.of(settings, model, machine, saes, options.run_file, sharded)


def _sharded(
    settings: TrainerSettings,
    options: argparse.Namespace,
    model: LanguageModelSize,
    machine: Machine,
    saes: list[StepCost],
) -> ShardedStep | None:
    """The step on as many GPUs as `--gpus` or `--days` ask for; None without them."""
    groups, tokens = groups_of(settings, model, saes), settings.run.tokens
    if options.gpus is not None:
        if options.gpus % len(groups):
            raise EstimateError(
                f"--gpus {options.gpus}: parallel.groups = {len(groups)} take as many GPUs each; give a multiple of "
                f"{len(groups)}"
            )
        return grouped_step(groups, machine, options.gpus)
    if options.days is None:
        return None
    if (step := fewest_gpus(groups, machine, tokens, options.days)) is None:
        raise EstimateError(f"--days {options.days:g}: no number of GPUs up to {MAX_GPUS} suffices; allow more days")
    return step


def _machine(settings: TrainerSettings, options: argparse.Namespace, width: int) -> Machine:
    """The machine that the arguments describe, or this one, measured at the size of the run's largest SAE."""
    numbers = options.matmul_tflops, options.bandwidth_gbs
    is_half = settings.optimizer.matmul != "float32"
    if options.machine is not None:
        if not is_half:
            raise EstimateError(
                "--machine is a data sheet for bfloat16 and optimizer.matmul is float32: give the two numbers "
                "yourself, --matmul-tflops X --bandwidth-gbs Y"
            )
        if any(numbers):
            raise EstimateError("--machine and --matmul-tflops or --bandwidth-gbs are both given: remove one")
        if options.machine not in MACHINES:
            raise EstimateError(
                f"--machine {show_value(options.machine)} is not known; there are {', '.join(MACHINES)}, or give its "
                "two numbers: --matmul-tflops X --bandwidth-gbs Y"
            )
        return MACHINES[options.machine]
    if options.gpus or options.days:
        raise EstimateError(f"--gpus and --days need --machine, whose links are known: {', '.join(MACHINES)}")
    if any(numbers):
        if not all(numbers):
            raise EstimateError("--matmul-tflops and --bandwidth-gbs belong together: give both")
        kernels, number_bytes = CPU if settings.optimizer.device == "cpu" else CUDA, HALF if is_half else FLOAT32
        return Machine("as given", 1e12 * numbers[0], 1e9 * numbers[1], math.inf, kernels, number_bytes)
    from trainer.planning.machine import measure_machine  # imports torch, which the other ways do not wait for

    largest = max(step_costs(settings, width, HALF), key=lambda sae: sae.d_in * sae.d_sae)
    return measure_machine(largest, settings.optimizer.device, training_threads(settings), settings.optimizer.matmul)
