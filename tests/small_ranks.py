"""Several ranks on this machine, for tests: processes that are started once and run functions over gloo."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT = timedelta(seconds=120)
SIZES = (2, 4)


class SmallRanks(AbstractContextManager["SmallRanks"]):
    """Four processes with one thread each, which act as 2 or as 4 ranks; `run` gives a function to all of them.

    Latents are cut at any place, not only at multiples of 1,024.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts = 0
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def run(
        self, function: Callable[..., Any], size: int, *args: Any, blocks: int = 1, exchange: str = "float32"
    ) -> list[Any]:
        """function(ranks, *args) on each of `size` ranks; returns what each returned. An exception is raised here."""
        if not self._processes:
            self._start()
        for pipe in self._pipes[:size]:
            pipe.send((function, size, blocks, exchange, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + LIMIT.total_seconds()
        while len(answers) < size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes[:size]) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self._stop()
                raise TimeoutError(f"{len(waiting)} of {size} ranks have not answered within {LIMIT}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    answers[rank], failure = pipe.recv()
                except EOFError:
                    failure = f"rank {rank} of {size} has ended"
                if failure:  # the others may wait in a collective for this one
                    self._stop()
                    raise AssertionError(failure)
        return [answers[rank] for rank in range(size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            store = str(self._folder / f"store-{self._starts}")
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from trainer.parallel.ranks import Ranks

    torch.set_num_threads(1)
    size = max(SIZES)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=LIMIT)
    groups = {each: dist.new_group(list(range(each)), timeout=LIMIT) for each in SIZES}
    while True:
        try:
            function, ranks_used, blocks, exchange, args = pipe.recv()
        except EOFError:
            return
        try:
            ranks = Ranks(rank, ranks_used, groups[ranks_used], blocks, latents_per_unit=1, exchange=exchange)
            pipe.send((function(ranks, *args), None))
        except Exception:
            pipe.send((None, f"rank {rank} of {ranks_used}:\n{traceback.format_exc()}"))
