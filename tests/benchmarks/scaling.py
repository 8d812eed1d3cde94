"""How the time of a TopK step grows with d_sae, d_in, k, the batch and the number of SAEs, beside its lower bound.

The lower bound is the encoder product, written to memory that is there, and the optimizer's bytes at the bandwidth of
a copy, both measured at each point. A point that would not fit into memory is left out. scaling.svg is drawn from what
bench.json holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from tests.benchmarks.measure import Options, Result, milliseconds
from tests.benchmarks.producer import demo_settings
from tests.benchmarks.step import BYTES, WRITTEN, limit, stepping
from tests.benchmarks.subject import SAMPLE_ROWS, Size, correlated_rows, hello_of, sae_trainer, size_for
from tests.benchmarks.svg import Axis, Points, document, frame, level, line, text, upright
from trainer.saes.settings import SaeSettings
from trainer.stream.buffer import Batch
from trainer.training.run import Run

PICTURE = Path(__file__).with_name("scaling.svg")
OURS, BOUND = "TopK step", "lower bound"
COLOURS = {OURS: "#c2410c", BOUND: "#64748b"}
AXES = {
    "d_sae": [2**power for power in range(12, 18)],
    "d_in": [256, 512, 1024, 2048, 4096],
    "k": [8, 16, 32, 64, 128, 256],
    "batch": [512, 1024, 2048, 4096, 8192, 16384],
    "SAEs": [1, 2, 4, 8],
}
MEMORY_FRACTION = 0.7
"""Of what is free, that a point may take."""


@dataclass(frozen=True)
class Point:
    """One SAE of some size, or several of them in one run."""

    size: Size
    saes: int = 1

    @property
    def bytes(self) -> int:
        """What it takes at the least, with gradients and a few batches."""
        of_one = 5 * 4 * self.size.parameters + 2 * self.size.batch * self.size.d_sae
        return self.saes * of_one + 16 * self.size.batch * self.size.d_in


def run(name: str, options: Options) -> Iterator[Result]:
    """Along one of AXES."""
    size = size_for(options.device, options.quick)
    values = AXES[name][:3] if options.quick else AXES[name]
    result = Result(f"Step time against {name} (otherwise {size})", "ms")
    for value in values:
        point = Point(size, saes=value) if name == "SAEs" else Point(size.but(**{name: value}))
        if point.bytes > MEMORY_FRACTION * _free(options.device):
            result.notes.append(f"{name} {value:,} left out: it needs {point.bytes / 1e9:.1f} GB")
            continue
        _measure(point, f"{name} {value}", options, result)
    yield result


def _measure(point: Point, label: str, options: Options, result: Result) -> None:
    rows = correlated_rows(max(point.size.batch, SAMPLE_ROWS), point.size.d_in)
    bound = Result(result.title, result.unit)
    bound.take_turns(
        options.rounds,
        {
            label: _learning(point, rows, options.device),
            **{name: act for name, act in limit(point.size, rows, options.device).items() if name in (WRITTEN, BYTES)},
        },
    )
    result.notes += bound.notes
    if label in bound.measured:
        result.measured[f"{OURS}, {label}"] = bound.measured[label]
        parts = zip(bound.measured[WRITTEN], bound.measured[BYTES], strict=True)
        result.measured[f"{BOUND}, {label}"] = [point.saes * sum(part) for part in parts]


def _learning(point: Point, rows: torch.Tensor, device: str) -> Callable[[], float]:
    """Milliseconds of a step of all its SAEs."""
    size = point.size
    if point.saes == 1:
        return stepping(sae_trainer("topk", size, device, rows), rows.to(device), size.batch)
    cores = torch.get_num_threads()
    settings = demo_settings(f"optimizer.batch={size.batch}", f"optimizer.device={device}", "run.threads=1")
    saes = [SaeSettings.of(name=f"{i}", architecture="topk", d_sae=size.d_sae, k=size.k) for i in range(point.saes)]
    with tempfile.TemporaryDirectory() as folder:
        at = settings.run.model_copy(update={"directory": folder, "tokens": None})
        run = Run(settings.model_copy(update={"sae": saes, "run": at}), hello_of(settings.hooks[0], size.d_in))
    narrow = rows.to(torch.bfloat16)
    run.initialise([narrow[:SAMPLE_ROWS]])
    batch = Batch([narrow[: size.batch]], np.zeros(size.batch, np.int64), np.arange(size.batch))
    for _ in range(2):
        run.train_step(batch)
    torch.set_num_threads(cores)
    return lambda: _on_one_thread(milliseconds(lambda: run.train_step(batch), device), cores)


def _on_one_thread(measure: Callable[[], float], cores: int) -> float:
    """As the run's own threads are, of which each takes care of one SAE; the lower bound has all cores."""
    torch.set_num_threads(1)
    try:
        return measure()
    finally:
        torch.set_num_threads(cores)


def _free(device: str) -> int:
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]


# The picture ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, GAP, BOTTOM = 200, 210, 66, 66, 24, 48
Series = dict[str, Points]


def redraw(sections: dict[str, Any]) -> None:
    """The picture of all that was measured, from the sections of bench.json."""
    panels = {
        name: _series(result["measured"])
        for name in AXES
        for result in sections.get(f"scaling-{name}", {"results": []})["results"]
    }
    PICTURE.write_text(_draw(panels))


def _series(milliseconds: dict[str, list[float]]) -> Series:
    """(value, milliseconds) of our step and of the lower bound."""
    series: Series = {OURS: [], BOUND: []}
    for name, times in milliseconds.items():
        which, _, point = name.rpartition(", ")
        series[which].append((float(point.split()[-1]), median(times)))
    return series


def _draw(panels: dict[str, Series]) -> str:
    """One log-log panel per quantity, beside each other, on one scale of milliseconds."""
    times = [y for series in panels.values() for points in series.values() for _, y in points] or [1.0, 10.0]
    y_axis = Axis(min(times) / 1.3, max(times) * 1.3, TOP + HEIGHT, TOP)
    parts = [text(16, TOP + HEIGHT / 2, "ms per step", anchor="middle", turned=True)]
    for place, (name, colour) in enumerate(COLOURS.items()):
        parts += line([(LEFT + 130 * place, 22), (LEFT + 24 + 130 * place, 22)], colour)
        parts.append(text(LEFT + 32 + 130 * place, 26.5, name))
    for column, (name, series) in enumerate(panels.items()):
        xs = [x for points in series.values() for x, _ in points] or [1.0, 2.0]
        x_offset = LEFT + column * (WIDTH + GAP)
        x_axis = Axis(min(xs) / 1.25, max(xs) * 1.25, x_offset, x_offset + WIDTH)
        parts.append(text(x_offset + WIDTH / 2, TOP - 10, name, anchor="middle", weight=600))
        parts += _grid(x_axis, y_axis, sorted(set(xs)), first=column == 0)
        for which in (BOUND, OURS):
            parts += line([(x_axis.at(x), y_axis.at(y)) for x, y in series[which]], COLOURS[which])
    return document(LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + BOTTOM, parts)


def _grid(x_axis: Axis, y_axis: Axis, xs: list[float], first: bool) -> Iterator[str]:
    for number, value in enumerate(xs):
        yield upright(x_axis.at(value), y_axis)
        if number % 2 == 0 or len(xs) < 5:
            yield text(x_axis.at(value), y_axis.start + 17, _short(value), anchor="middle")
    for value in (tick * 10.0**power for power in range(-2, 6) for tick in (1, 2, 5)):
        if y_axis.low <= value <= y_axis.high:
            yield level(y_axis.at(value), x_axis)
            if first:
                yield text(x_axis.start - 7, y_axis.at(value) + 4.5, f"{value:,.4g}", anchor="end")
    yield frame(x_axis, y_axis)


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
