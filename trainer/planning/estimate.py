"""`python -m trainer estimate RUN.toml`: how fast a run would be, what it would hold, what bounds it, before it starts.

The arithmetic is in `cost.py`. Its two numbers are measured by `machine.py`, or come from a data sheet (`--machine`) or
from you (`--matmul-tflops`, `--bandwidth-gbs`). Exit codes: 0 told, 2 the arguments do not say enough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from producer.common.addresses import model_directory, path_argument
from producer.common.completion import complete
from producer.common.formatting import format_bytes, format_duration
from producer.common.parsing import ParseError, read_object
from producer.common.run_file import read_run_file
from producer.common.shell import shell_command
from producer.common.toml import SettingsError, show_value
from trainer.planning import cost
from trainer.planning.cost import Machine, Sharded, Work
from trainer.planning.machine import measure_machine
from trainer.saes.settings import ASSUMED_L0, SaeSettings
from trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from rich.table import Table

PURPOSE = """Predicts the speed, the memory and the duration of a run from two numbers of a machine: the rate of its
encoder product and the bandwidth of its memory. Without options they are measured here, in about two seconds.

Several GPUs: `--gpus N`, or `--days D` for the fewest. That is what a trainer would need whose latents are sharded over
GPUs. Sluice's trainer runs on one device and does not shard."""

HINTS = {
    "encoder product": "it grows with d_in × d_sae × batch: a smaller d_sae or a machine with faster products",
    "pre-activations": "they are batch × d_sae numbers: a smaller d_sae, or a wider model hides them",
    "choice of latents": "it reads every pre-activation: a smaller d_sae or, with topk, a smaller k",
    "sparse products": "they grow with batch × k × d_in: a smaller k",
    "optimizer": "its bytes are the same for every batch: a larger optimizer.batch spreads them over more rows",
    "rows and entries": "they are passes over the batch: little but the width of the model decides",
    "overhead": "the steps are tiny: a larger optimizer.batch",
    "x to all": "rows reach every GPU: a faster network between machines",
    "candidates": "each GPU sends k of them per row to all others: fewer GPUs, or fewer candidates than k from each",
    "reconstruction summed": "it is batch × d_out numbers: fewer machines, or a faster network between them",
}
"""What each part grows with, and what makes it smaller."""


class EstimateError(ValueError):
    """What was said does not suffice for an estimate. The message says what to add."""


def main(arguments: list[str]) -> int:
    parser = _parser()
    complete(parser, arguments)
    given = parser.parse_intermixed_args(arguments)
    try:
        settings = read_run_file(TrainerSettings, given.run_file, given.overrides)
        estimate = Estimate.of(settings, given)
    except (SettingsError, EstimateError) as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(estimate.as_json(), indent=1))
    else:
        _show(estimate)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        shell_command("trainer", "estimate"), description=PURPOSE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_file", type=path_argument, metavar="RUN.toml", help="the run's settings; deploy/ holds examples"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces one setting of the file")
    parser.add_argument(
        "--machine", metavar="NAME", help=f"data sheet instead of measuring: {', '.join(cost.MACHINES)}"
    )
    parser.add_argument("--matmul-tflops", type=_positive, metavar="X", help="rate of the encoder product, 10¹² FLOP/s")
    parser.add_argument("--bandwidth-gbs", type=_positive, metavar="Y", help="bandwidth of a copy, 10⁹ bytes/s")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="latents sharded over so many GPUs (not Sluice's trainer)"
    )
    parser.add_argument("--days", type=_positive, metavar="D", help="the fewest GPUs that end run.tokens in so long")
    parser.add_argument(
        "--width", type=_count, metavar="D", help="of a row of each hook, when the model is not on this disk"
    )
    parser.add_argument(
        "--model-parameters", type=_positive, metavar="P", help="weights of the model's blocks up to the last hook"
    )
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{show_value(text)}: expected a number above 0")
    return value


def _count(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and int(text)):
        raise argparse.ArgumentTypeError(f"{show_value(text)}: expected a whole number above 0")
    return int(text)


# What the run asks for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModel:
    """What an estimate needs to know of it."""

    width: int
    parameters: float | None
    """Weights in the blocks up to the last hook; None when they are not known."""


def works_of(settings: TrainerSettings, width: int, number: int) -> list[Work]:
    """Every SAE of the run; rows of every hook are `width` wide, `number` are the bytes of a number in products."""
    return [_work(settings, sae, width, number) for sae in settings.sae]


def _work(settings: TrainerSettings, sae: SaeSettings, width: int, number: int) -> Work:
    hooks = settings.hooks_of(sae)
    return Work(
        name=sae.name,
        architecture=sae.architecture,
        d_in=width * len(hooks.reads),
        d_out=width * len(hooks.writes),
        d_sae=sae.d_sae,
        batch=settings.optimizer.batch,
        levels=len(sae.levels),
        unit_decoder=sae.unit_decoder,
        centred=sae.centred,
        skip=sae.skip,
        whitening=sae.whitening,
        ema=sae.ema_tokens is not None,
        number=number,
        **vars(sae.cost_terms()),
    )


def language_model(settings: TrainerSettings, width: int | None, parameters: float | None) -> LanguageModel:
    """The width of its rows, and its weights up to the last hook: as told, or read from its folder on this disk."""
    if settings.corpus.synthetic is not None and settings.model is None:
        return LanguageModel(width or settings.corpus.synthetic.d_in, parameters)
    assert settings.model is not None
    folder = model_folder(settings.model.name)
    if folder is not None:
        width = width or _width(_config(folder / "config.json"))
        parameters = parameters or blocks_parameters(folder, [_block(hook) for hook in settings.model.hooks])
    if width is None:
        raise EstimateError(
            f"model.name = {show_value(settings.model.name)} is not on this disk, so the width of its rows is not "
            "known: add --width, such as --width 768"
        )
    return LanguageModel(width, parameters)


def model_folder(name: str) -> Path | None:
    """Where the model lies: a folder, or the hub's cache; None when it is not here."""
    if (folder := model_directory(name)).is_dir():
        return folder if (folder / "config.json").is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the hub, such as a path that does not exist
        return None
    return Path(found).parent if isinstance(found, str) else None


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ParseError) as error:
        raise EstimateError(f"{path} cannot be read: {error}; add --width, such as --width 768") from None


def _width(config: dict[str, Any]) -> int | None:
    config = config.get("text_config", config)
    return next((config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config), None)


def _block(hook: str) -> int | None:
    """The number of the block that a hook is in; None when its name has no number."""
    return next((int(part) for part in hook.split(".") if part.isdigit()), None)


def blocks_parameters(folder: Path, blocks: list[int | None]) -> float | None:
    """Weights of the matrices in all blocks up to the last of `blocks`, from the heads of the folder's files."""
    from safetensors import safe_open

    numbers = [block for block in blocks if block is not None]
    total = 0.0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                block, shape = _block(name), file.get_slice(name).get_shape()
                if block is not None and len(shape) == 2 and numbers and block <= max(numbers):
                    total += math.prod(shape)
    return total or None


# The machine ----------------------------------------------------------------------------------------------------------


def machine_of(settings: TrainerSettings, given: argparse.Namespace, width: int) -> Machine:
    """The machine that the arguments name, or this one, measured at the size of the run's largest SAE."""
    numbers = given.matmul_tflops, given.bandwidth_gbs
    number = cost.FLOAT32 if settings.optimizer.matmul == "float32" else cost.HALF
    if given.machine is None and (given.gpus or given.days):
        raise EstimateError(f"--gpus and --days need --machine, whose links are known: {', '.join(cost.MACHINES)}")
    if given.machine is not None:
        if number != cost.HALF:
            raise EstimateError(
                "--machine is a data sheet for bfloat16 and optimizer.matmul is float32: give the two numbers "
                "yourself, --matmul-tflops X --bandwidth-gbs Y"
            )
        if any(numbers):
            raise EstimateError("--machine and --matmul-tflops or --bandwidth-gbs are both given: remove one")
        if given.machine not in cost.MACHINES:
            known = ", ".join(cost.MACHINES)
            raise EstimateError(
                f"--machine {show_value(given.machine)} is not known; there are {known}, or give its two numbers: "
                "--matmul-tflops X --bandwidth-gbs Y"
            )
        return cost.MACHINES[given.machine]
    if any(numbers):
        if not all(numbers):
            raise EstimateError("--matmul-tflops and --bandwidth-gbs belong together: give both")
        kernels = cost.CPU if settings.optimizer.device == "cpu" else cost.CUDA
        return Machine("as given", 1e12 * numbers[0], 1e9 * numbers[1], math.inf, kernels, number)
    largest = max(works_of(settings, width, cost.HALF), key=lambda work: work.d_in * work.d_sae)
    return measure_machine(largest, settings.optimizer.device, threads_at_work(settings), settings.optimizer.matmul)


def threads_at_work(settings: TrainerSettings) -> int:
    """CPU threads that learn: those of one SAE times the SAEs that learn side by side."""
    cores, count = os.cpu_count() or 1, len(settings.sae)
    each = min(cores, settings.run.threads or max(1, cores // count))
    return min(cores, each * min(count, cores // each))


# The estimate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """All that is told."""

    works: list[Work]
    machine: Machine
    tokens: int | None
    """What the run trains on; None when it ends with the data."""
    row_bytes: int
    """On the wire and in the buffer, for one token: the rows of all hooks."""
    buffer: float
    forward: float | None
    """Seconds of the language model per token on such a machine; None when its size is not known."""
    snapshot_every: int
    """Tokens."""
    checkpoint_every: float
    """Seconds."""
    shares_machine: bool
    """The run file puts language model and SAEs on the same device, and there is one."""
    sharded: Sharded | None
    days: float | None
    """What was asked for."""
    warnings: list[str]
    """What of the settings will surprise."""

    @classmethod
    def of(cls, settings: TrainerSettings, given: argparse.Namespace) -> Estimate:
        """Raises EstimateError when something is missing."""
        if given.gpus is not None and given.gpus < 1:
            raise EstimateError(f"--gpus {given.gpus}: one at least")
        model = language_model(settings, given.width, given.model_parameters)
        machine = machine_of(settings, given, model.width)
        works = works_of(settings, model.width, machine.number)
        held = cost.HALF if settings.stream.dtype == "bfloat16" else cost.FLOAT32
        row_bytes, tokens = held * model.width * len(settings.hooks), settings.run.tokens
        several: Sharded | None = None
        if given.gpus is not None:
            several = cost.sharded(works, machine, given.gpus, row_bytes)
        elif given.days is not None:
            several = cost.fewest(works, machine, row_bytes, tokens, given.days)
            if several is None:
                raise EstimateError(f"--days {given.days:g}: no number of GPUs up to 4096 suffices; allow more days")
        return cls(
            works=works,
            machine=machine,
            tokens=tokens,
            row_bytes=row_bytes,
            buffer=cost.buffer_bytes(settings.buffer.rows, [model.width] * len(settings.hooks), held),
            forward=None if model.parameters is None else cost.forward_seconds(model.parameters, model.width, machine),
            snapshot_every=settings.snapshots.every_tokens,
            checkpoint_every=settings.checkpoint.every_seconds,
            shares_machine=settings.model is not None and settings.model.device == settings.optimizer.device,
            sharded=several,
            days=given.days,
            warnings=settings.warnings(),
        )

    @property
    def batch(self) -> int:
        return max(work.batch for work in self.works)

    @property
    def step(self) -> float:
        """Seconds of one step of all SAEs on one device."""
        return sum(cost.step_seconds(work, self.machine) for work in self.works)

    @property
    def rate(self) -> float:
        """Tokens per second of the trainer: one device, or all GPUs that were asked for."""
        return self.batch / (self.step if self.sharded is None else self.sharded.step_seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by part, all SAEs together."""
        if self.sharded is not None:
            return self.sharded.seconds
        each = [cost.step_parts(work, self.machine) for work in self.works]
        return {name: sum(parts[name] for parts in each) for name in each[0]}

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on one device by what holds them; a GPU's host has the buffer."""
        each = [cost.memory_parts(work, self.machine.kernels) for work in self.works]
        parts = {name: sum(parts[name] for parts in each) for name in each[0]} | {
            "process": self.machine.kernels.process_bytes
        }
        return parts | ({"buffer": self.buffer} if self.machine.kernels is cost.CPU else {})

    @property
    def producers(self) -> float | None:
        """How many producers, each on such a machine of its own, keep the trainer busy."""
        return None if self.forward is None else self.rate * self.forward

    def as_json(self) -> dict[str, Any]:
        machine = self.machine
        several = self.sharded
        return {
            "machine": {
                "name": machine.name,
                "matmul_flops": machine.matmul_flops,
                "bandwidth": machine.bandwidth,
                "memory": machine.memory if math.isfinite(machine.memory) else None,
            },
            "saes": {
                work.name: {
                    "seconds": cost.step_parts(work, machine),
                    "step_seconds": cost.step_seconds(work, machine),
                    "parameters": work.parameters,
                    "memory": cost.memory_parts(work, machine.kernels),
                    "snapshot_bytes": cost.snapshot_bytes(work),
                    "checkpoint_bytes": cost.checkpoint_bytes(work),
                }
                for work in self.works
            },
            "step_seconds": self.step,
            "tokens_per_second": self.rate,
            "days": None if self.tokens is None else self.tokens / self.rate / 86400,
            "memory": self.memory,
            "wire_bytes_per_token": self.row_bytes,
            "producer_tokens_per_second": None if self.forward is None else 1 / self.forward,
            "producers": self.producers,
            "sharded": None
            if several is None
            else {
                "gpus": several.gpus,
                "seconds": several.seconds,
                "bytes": several.bytes,
                "memory_per_gpu": several.memory,
                "fits": several.fits,
            },
        }

    def sentences(self) -> list[str]:
        """What bounds the run, and what to change."""
        parts = self.parts
        slowest = max(parts, key=lambda name: parts[name])
        told = [f"The largest part of a step: {slowest}, {parts[slowest] / sum(parts.values()):.0%}; {HINTS[slowest]}."]
        if self.forward is not None and self.producers is not None:
            told.append(_balance(self.producers, self.rate, 1 / self.forward))
            if self.shares_machine and self.sharded is None:
                both = 1 / (1 / self.rate + self.forward)
                told.append(f"Where the two share one machine: {both:,.0f} tokens/s.")
        if self.sharded is None and (held := sum(self.memory.values())) > cost.USABLE * self.machine.memory:
            told.append(f"It does not fit: {format_bytes(held)} of {format_bytes(self.machine.memory)}.")
        if self.sharded is not None and not self.sharded.fits:
            needed = cost.fewest(self.works, self.machine, self.row_bytes, None, None)
            more = "" if needed is None else f"; {needed.gpus} GPUs hold it"
            told.append(f"It does not fit: {format_bytes(self.sharded.memory)} on each GPU{more}.")
        if assumed := [work.name for work in self.works if work.l0_is_assumed]:
            told.append(f"How many latents of {', '.join(assumed)} are active is not set; {ASSUMED_L0:g} is assumed.")
        return told + [f"{warning}." for warning in self.warnings]


def _balance(producers: float, rate: float, one: float) -> str:
    if producers >= 1:
        return (
            f"The language model is the slower side: a producer gives {one:,.0f} tokens/s on such a machine, the "
            f"trainer takes {rate:,.0f}; {math.ceil(producers)} producers balance it."
        )
    return (
        f"The trainer is the slower side: one producer on such a machine gives {one:,.0f} tokens/s, enough for "
        f"{1 / producers:.1f} trainers like it."
    )


# How it is shown ------------------------------------------------------------------------------------------------------


def _show(estimate: Estimate) -> None:
    from rich.console import Console

    console, machine = Console(soft_wrap=False), estimate.machine
    console.print(
        f"{machine.name}: encoder product {machine.matmul_flops / 1e12:.3g} TFLOP/s, "
        f"copy {machine.bandwidth / 1e9:,.3g} GB/s",
        highlight=False,
    )
    console.print(_steps(estimate) if estimate.sharded is None else _sharded_steps(estimate.sharded))
    console.print(_totals(estimate))
    for sentence in estimate.sentences():
        console.print(sentence, highlight=False)
    if estimate.sharded is not None:
        console.print("Sluice's trainer does not shard: this is what one that does would need.", style="bold")
    if machine.kernels is cost.CUDA:
        console.print("GPU figures are counted from the kernels and not measured.", style="dim")


def _steps(estimate: Estimate) -> Table:
    """A column per SAE, a row per part of its step."""
    table = _table("One step, ms", *(work.name for work in estimate.works), "all")
    each = [cost.step_parts(work, estimate.machine) for work in estimate.works]
    for name, total in estimate.parts.items():
        table.add_row(name, *(_ms(parts[name]) for parts in each), _ms(total))
    table.add_section()
    table.add_row("together", *(_ms(sum(parts.values())) for parts in each), _ms(estimate.step))
    return table


def _sharded_steps(several: Sharded) -> Table:
    """What a step of sharded latents takes, and which bytes reach each GPU."""
    table = _table(f"One step, latents sharded over {several.gpus} GPUs", "ms", "bytes to each GPU")
    table.add_row("rows in, from producers", "", format_bytes(several.bytes["rows in"]))
    for name, seconds in several.seconds.items():
        table.add_row(name, _ms(seconds), format_bytes(several.bytes[name]) if name in several.bytes else "")
    table.add_section()
    table.add_row("together", _ms(several.step_seconds), "")
    return table


def _totals(estimate: Estimate) -> Table:
    table = _table("The run", "")
    table.add_row("tokens/s of the trainer", f"{estimate.rate:,.0f}")
    if estimate.tokens is not None:
        table.add_row(f"for {estimate.tokens:,} tokens", format_duration(estimate.tokens / estimate.rate))
    table.add_row(
        "on the wire",
        f"{format_bytes(estimate.row_bytes)} per token, {format_bytes(estimate.row_bytes * estimate.rate)}/s",
    )
    if estimate.sharded is None:
        held = estimate.memory
        table.add_row("memory", format_bytes(sum(held.values())))
        for name, size in held.items():
            table.add_row(f"  {name}", format_bytes(size))
    else:
        table.add_row("memory of each GPU", format_bytes(estimate.sharded.memory))
    if estimate.machine.kernels is not cost.CPU:
        table.add_row("buffer, on the host", format_bytes(estimate.buffer))
    snapshot, checkpoint = (sum(map(size, estimate.works)) for size in (cost.snapshot_bytes, cost.checkpoint_bytes))
    table.add_row(
        "a snapshot", f"{format_bytes(snapshot)} every {format_duration(estimate.snapshot_every / estimate.rate)}"
    )
    table.add_row("a checkpoint", f"{format_bytes(checkpoint)} every {format_duration(estimate.checkpoint_every)}")
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
