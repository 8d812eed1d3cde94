"""An estimate as tables in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from producer.common.formatting import format_bytes, format_duration
from trainer.planning import cost
from trainer.planning.prediction import Estimate
from trainer.planning.sharding import ShardedStep

MOST_COLUMNS = 6
"""SAEs that stand beside each other in a terminal of 80 columns."""


def show(estimate: Estimate) -> None:
    """Prints the tables, and the sentences below them."""
    console, machine = Console(soft_wrap=False), estimate.machine
    console.print(
        f"{machine.name}: encoder product {machine.matmul_flops / 1e12:.3g} TFLOP/s, "
        f"copy {machine.bandwidth / 1e9:,.3g} GB/s",
        highlight=False,
    )
    console.print(_steps(estimate) if estimate.sharded is None else _sharded_steps(estimate.sharded))
    if len(estimate.groups) > 1:
        console.print(_groups(estimate))
    console.print(_totals(estimate))
    console.print(_start(estimate))
    for sentence in estimate.sentences():
        console.print(sentence, highlight=False)
    if estimate.sharded is not None:
        console.print(
            "Counted for ranks under torchrun, and never measured: NCCL over several GPUs is untested.", style="bold"
        )
    if machine.kernels is cost.CUDA:
        console.print("GPU figures are counted from the kernels and not measured.", style="dim")


def _steps(estimate: Estimate) -> Table:
    """A column for each SAE, a row for each part of its step; of many SAEs, a row for each."""
    if len(estimate.saes) > MOST_COLUMNS:
        return _steps_of_many(estimate)
    table = _table("One step, ms", *(sae.name for sae in estimate.saes), "all")
    each = [cost.step_parts(sae, estimate.machine) for sae in estimate.saes]
    for name, total in estimate.parts.items():
        table.add_row(name, *(_ms(parts[name]) for parts in each), _ms(total))
    table.add_section()
    table.add_row("together", *(_ms(sum(parts.values())) for parts in each), _ms(estimate.step_seconds))
    return table


def _steps_of_many(estimate: Estimate) -> Table:
    table = _table("One step", "ms", "of it", "largest part")
    for sae in estimate.saes:
        parts = cost.step_parts(sae, estimate.machine)
        seconds, largest = sum(parts.values()), max(parts, key=parts.__getitem__)
        table.add_row(sae.name, _ms(seconds), f"{parts[largest] / seconds:.0%}", largest)
    table.add_section()
    largest = max(estimate.parts, key=estimate.parts.__getitem__)
    share = f"{estimate.parts[largest] / estimate.step_seconds:.0%}"
    table.add_row("all", _ms(estimate.step_seconds), share, largest)
    return table


def _sharded_steps(step: ShardedStep) -> Table:
    """Seconds and bytes of a step of sharded latents, a row for each part."""
    table = _table(f"One step, latents sharded over {step.gpus} GPUs", "ms", "bytes to each GPU")
    table.add_row("rows in, from producers", "", format_bytes(step.bytes["rows in"]))
    for name, seconds in step.seconds.items():
        table.add_row(name, _ms(seconds), format_bytes(step.bytes[name]) if name in step.bytes else "")
    table.add_section()
    table.add_row("together", _ms(step.step_seconds), "")
    return table


def _groups(estimate: Estimate) -> Table:
    """Which placement group trains which SAEs, and what its step takes where GPUs are asked about."""
    table = _table("Placement groups", "ms", "memory of each GPU", "activations of a token")
    table.add_column("SAEs", overflow="fold")
    for index, (group, step) in enumerate(zip(estimate.groups, estimate.group_steps, strict=True)):
        seconds, memory = ("", "") if step is None else (_ms(step.step_seconds), format_bytes(step.memory))
        names = ", ".join(sae.name for sae in group.saes)
        table.add_row(f"group {index}", seconds, memory, format_bytes(group.token_bytes), names)
    return table


def _totals(estimate: Estimate) -> Table:
    table = _table("The run", "")
    table.add_row("tokens/s of the trainer", f"{estimate.rate:,.0f}")
    for title, seconds in estimate.durations.items():
        table.add_row(title, format_duration(seconds))
    for schedule in dict.fromkeys(estimate.schedules.values()):
        names = [name for name, other in estimate.schedules.items() if other == schedule]
        of_which = "" if len(names) == len(estimate.schedules) else f" of {', '.join(names)}"
        warmup = f", after a warm-up over {schedule.warmup_tokens:,} tokens" if schedule.warmup_tokens else ""
        table.add_row(f"learning rate{of_which}", f"{schedule.learning_rate:.2g}{warmup}")
    table.add_row(
        "on the wire",
        f"{format_bytes(estimate.token_bytes)} per token, {format_bytes(estimate.token_bytes * estimate.run_rate)}/s",
    )
    if estimate.hooks > 1:
        each = f"{format_bytes(estimate.token_bytes / estimate.hooks)} per token"
        buffer = f"{format_bytes(estimate.buffer / estimate.hooks)} of the buffer"
        table.add_row(f"  each of {estimate.hooks} hooks", f"{each}, {buffer}")
    if estimate.sharded is None:
        memory = estimate.memory
        table.add_row("memory", format_bytes(sum(memory.values())))
        for name, size in memory.items():
            table.add_row(f"  {name}", format_bytes(size))
    else:
        table.add_row("memory of each GPU", format_bytes(estimate.sharded.memory))
    if estimate.machine.kernels is not cost.CPU:
        table.add_row("buffer, on the host", format_bytes(estimate.buffer))
    snapshot, checkpoint = (sum(map(size, estimate.saes)) for size in (cost.snapshot_bytes, cost.checkpoint_bytes))
    table.add_row(
        "a snapshot", f"{format_bytes(snapshot)} every {format_duration(estimate.snapshot_every / estimate.run_rate)}"
    )
    table.add_row("a checkpoint", f"{format_bytes(checkpoint)} every {format_duration(estimate.checkpoint_every)}")
    return table


def _start(estimate: Estimate) -> Table:
    """The commands that start the run."""
    table = Table(title="To start it", title_justify="left")
    table.add_column("")
    table.add_column("", overflow="fold")
    for row in estimate.start.rows():
        table.add_row(*row)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
