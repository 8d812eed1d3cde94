"""The shuffling buffer: a batch drawn and its places filled again, beside a plain gather of as many rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import psutil
import torch

from tests.benchmarks.measure import Figure, Options, Result, milliseconds
from trainer.stream.buffer import ShuffleBuffer

CAPACITY, WIDTH, BATCH = 262_144, 768, 4096
TURNS = 200
"""Batches drawn and filled again while memory is watched."""


def run(options: Options) -> Iterator[Result]:
    capacity = CAPACITY // 16 if options.quick else CAPACITY
    rows = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    buffer = ShuffleBuffer(capacity, [WIDTH], torch.bfloat16, seed=0)
    serials = itertools.count()

    def refill() -> None:
        buffer.insert([rows], next(serials), np.arange(BATCH))

    def draw_and_refill() -> None:
        buffer.draw(BATCH)
        refill()

    while buffer.rows < capacity:
        refill()
    store = torch.randn(capacity, WIDTH).to(torch.bfloat16)
    places = itertools.cycle(torch.randint(capacity, (64, BATCH)))
    result = Result(f"Buffer of {capacity:,} rows of {WIDTH} bfloat16, batches of {BATCH}", "ms").take_turns(
        options.rounds,
        {
            "draw and refill": milliseconds(draw_and_refill),
            "plain gather": milliseconds(lambda: store.index_select(0, next(places))),
        },
    )
    before = psutil.Process().memory_info().rss
    for _ in range(TURNS):
        draw_and_refill()
    growth = psutil.Process().memory_info().rss - before
    of_rows = 2 * WIDTH * capacity
    result.figures = [
        Figure("rate of draw and refill / plain gather", result.ratio("plain gather", "draw and refill"), 0.5, True),
        Figure("bytes held / bytes of its rows", buffer.nbytes / of_rows),
        Figure(f"memory gained over {TURNS} batches / bytes of its rows", growth / of_rows, 0.01),
    ]
    yield result
